"""What happens to one source tensor, as a value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantconvert.checkpoint import TensorRef
from quantconvert.families import Reason
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.schemes import Request

# Kept weights that engines hold as ordinary linear layers: the config block must name them.
LINEAR_REASONS: frozenset[Reason] = frozenset(
    {"lm_head", "router", "vision", "audio", "state-space", "mtp", "head", "family", "ignored", "indivisible",
     "non-finite"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """One source tensor: to be quantized as `request` asks, or kept (`reason` set, `request` None)."""

    ref: TensorRef
    reason: Reason | None
    evidence: str
    is_expert: bool = False
    request: Request | None = None

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
        return self.is_expert and self.reason == "not 2-D"

    def kept(self, reason: Reason, evidence: str) -> Decision:
        return replace(self, reason=reason, evidence=evidence, request=None)
