"""What happens to one tensor of the source, as a value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantconvert.families import Reason
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.schemes import Request, Scheme
from quantconvert.sources import Read

# Kept weights that engines hold as ordinary linear layers: the config block must name them.
LINEAR_REASONS: frozenset[Reason] = frozenset(
    {"lm_head", "router", "vision", "audio", "state-space", "mtp", "head", "family", "ignored", "indivisible",
     "non-finite", "plain"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """One tensor: to be quantized as `request` asks, its codes to be stored anew under `scheme`, to be decoded to
    `dtype` (a safetensors tag), or kept for a `reason`.

    `by_table`: decided by the config, the family's table or the user's rules, not by what names and shapes suggest.
    """

    ref: Read
    reason: Reason | None
    evidence: str
    is_expert: bool = False
    request: Request | None = None
    by_table: bool = True
    scheme: Scheme | None = None
    dtype: str | None = None

    @property
    def module(self) -> str:
        return self.ref.name.removesuffix(WEIGHT_SUFFIX)

    @property
    def is_kept_linear(self) -> bool:
        """Kept, but an engine would take it for a linear layer unless told."""
        return self.reason in LINEAR_REASONS and len(self.ref.shape) == 2 and self.ref.name.endswith(WEIGHT_SUFFIX)

    @property
    def is_kept_experts(self) -> bool:
        """A fused 3-D tensor of routed experts that stays as it is."""
        return self.is_expert and self.reason is not None and len(self.ref.shape) == 3

    @property
    def is_decoded(self) -> bool:
        """Quantized in the source, in high precision in the result."""
        return self.reason is not None and self.ref.num_bits is not None

    def kept(self, reason: Reason, evidence: str) -> Decision:
        return replace(self, reason=reason, evidence=evidence, request=None, by_table=reason == "ignored")
