"""What happens to one tensor of the source, as a value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from quantconvert.families import Reason
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.schemes import Request, Scheme
from quantconvert.sources import Read

# A table that is looked up: the last word of its name. What stands under `embeddings` beside them multiplies.
_TABLE = re.compile(
    r"(^|[._])(embed\w*|\w+_embed|\w*embeddings?|wte|wpe|shared|relative_attention_bias|pos_emb\w*|rotary_emb\w*"
    r"|position_\w+|cls_token|mask_token)$"
)
_MULTIPLIES = re.compile(r"proj|mapping|linear|dense|unembed", re.I)


def is_kept_linear(name: str, rank: int, reason: Reason | None) -> bool:
    """Whether engines hold a tensor that is kept for `reason` as a linear layer, so that the config must name it.

    Any 2-D `*.weight` is one, whatever it is called, but for norms, buffers and tables of embeddings.
    """
    if rank != 2 or not name.endswith(WEIGHT_SUFFIX) or reason in (None, "norm", "not a weight"):
        return False
    if reason != "embedding":
        return True
    last = name.removesuffix(WEIGHT_SUFFIX).rpartition(".")[2]
    return bool(_MULTIPLIES.search(last)) or _TABLE.search(last) is None


class Decision(NamedTuple):
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
        return is_kept_linear(self.ref.name, len(self.ref.shape), self.reason)

    @property
    def is_kept_experts(self) -> bool:
        """A fused 3-D tensor of routed experts that stays as it is."""
        return self.is_expert and self.reason is not None and len(self.ref.shape) == 3

    @property
    def is_decoded(self) -> bool:
        """Quantized in the source, in high precision in the result."""
        return self.reason is not None and self.ref.num_bits is not None

    def kept(self, reason: Reason, evidence: str) -> Decision:
        return self._replace(reason=reason, evidence=evidence, request=None, by_table=reason == "ignored")


def requests_of(decisions: Iterable[Decision]) -> list[Request]:
    """The requests of what is quantized, each once, in their order: by `id` first, as nearly all are one object."""
    found = {id(d.request): d.request for d in decisions if d.request is not None}
    return list(dict.fromkeys(found.values()))
