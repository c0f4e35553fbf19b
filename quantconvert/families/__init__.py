"""Which tensors are linear layers, decided from the config and the family's table first, then from names.

Never from shape alone: in a family without a table, a weight counts as linear only when it is called `*.weight`, is
two-dimensional, sits in a numbered layer, and no name rule says otherwise; the plan then says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from quantconvert.dtypes import DTYPES
from quantconvert.families.block import Block, Experts, Mlp, NormKind
from quantconvert.families.common import EXPERT_NAMES, FUSED_COMMON, KEEP_BY_NAME, TOWERS
from quantconvert.families.fused import fused_groups
from quantconvert.families.row import (
    REASON_TEXT,
    REASONS,
    Dims,
    Family,
    Fold,
    FusedExperts,
    FusedSet,
    Part,
    Reason,
    Role,
    Stream,
    Values,
)
from quantconvert.patterns import WEIGHT_SUFFIX, template_of

if TYPE_CHECKING:
    from quantconvert.checkpoint import Checkpoint
    from quantconvert.families.tables import FAMILIES

__all__ = [
    "FAMILIES", "KEEP_BY_NAME", "REASONS", "REASON_TEXT", "Block", "Classifier", "Dims", "Experts", "Family", "Fold",
    "FusedExperts", "FusedSet", "Mlp", "NormKind", "Part", "Reason", "Role", "Stream", "Values", "find_family",
    "fused_groups", "stands_aside",
]  # fmt: skip

NO_TABLE = Family("unknown", (), (), fused=FUSED_COMMON)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def __getattr__(name: str) -> Any:
    """`FAMILIES`, whose rows are imported by those who look into them."""
    if name != "FAMILIES":
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    from quantconvert.families.tables import FAMILIES

    return FAMILIES


def find_family(checkpoint: Checkpoint) -> Family | None:
    """The table whose `model_types` names the config's model_type (or its text_config's)."""
    from quantconvert.families.tables import FAMILIES

    types = (checkpoint.model_type, str(checkpoint.text_config.get("model_type") or ""))
    return next((family for family in FAMILIES for t in types if t and t in family.model_types), None)


def stands_aside(layer: str, family: Family) -> bool:
    """Whether a layer (`model.visual.blocks.3.`) is of a tower or predicts a second token, and so not of the model."""
    rules = (*TOWERS, *((pattern, reason) for pattern, reason in family.keep if reason in ("vision", "audio", "mtp")))
    return any(re.search(pattern, template_of(layer + "N")) for pattern, _ in rules)


class Tensor(Protocol):
    """What the classifier looks at."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Classifier:
    """Gives each tensor of one checkpoint its `Role`, decided once for all of one name template, dtype and shape."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.text_config
        self.family = find_family(checkpoint)
        self.model_type = checkpoint.model_type
        layers = config.get("num_hidden_layers") if config.get("num_nextn_predict_layers") else None
        self.num_layers = layers if isinstance(layers, int) else None
        self._by_template = cache(self._classify)
        self._known: dict[tuple[str, str, tuple[int, ...]], Role] = {}
        self._beyond = cache(self._mtp)
        self._roles: tuple[Sequence[Tensor], list[Role]] = (), []

    @property
    def fused(self) -> tuple[FusedSet, ...]:
        return (self.family or NO_TABLE).fused

    @property
    def tied(self) -> tuple[str, ...]:
        return (self.family or NO_TABLE).tied

    def role(self, ref: Tensor) -> Role:
        """What `ref` is. Shapes only rule out (a linear weight is 2-D); they never rule in."""
        if self.num_layers is not None:
            layer = _LAYER.search(ref.name)
            if layer and int(layer[1]) >= self.num_layers:
                return self._beyond(layer[1])
        kind = template_of(ref.name), ref.dtype, ref.shape
        return self._known.get(kind) or self._known.setdefault(kind, self._kind_of(ref, kind[0]))

    def _kind_of(self, ref: Tensor, template: str) -> Role:
        """What `ref` is, and all tensors of its kind."""
        role = self._by_template(template, len(ref.shape))
        if role.reason is None and not ref.nbytes:
            return Role("not a weight", "no elements", role.is_expert)
        if role.reason is None and not DTYPES[ref.dtype].is_weight:
            return Role("not a weight", f"dtype {ref.dtype}", role.is_expert)
        return role

    def roles(self, refs: Sequence[Tensor]) -> Sequence[Role]:
        """The role of each; those of the sequence that was asked for last are remembered."""
        if self._roles[0] is not refs:
            self._roles = refs, list(map(self.role, refs))
        return self._roles[1]

    def _mtp(self, layer: str) -> Role:
        return Role("mtp", f"config: layer {layer} of num_hidden_layers {self.num_layers}", by_table=True)

    def _classify(self, template: str, rank: int) -> Role:
        is_weight = template.endswith(WEIGHT_SUFFIX)
        module = template.removesuffix(WEIGHT_SUFFIX)
        family = self.family or NO_TABLE
        for pattern, reason in family.keep:
            if re.search(pattern, module):
                return Role(reason, f"family {family.name}: `{pattern}`", by_table=True)
        for pattern, reason in TOWERS:
            if re.search(pattern, module):
                return Role(reason, f"name rule `{pattern}`")
        for pattern in family.linear if is_weight and rank == 2 else ():
            if re.search(pattern, module):
                is_expert = bool(family.experts and re.search(family.experts, module))
                return Role(None, f"family {family.name}: `{pattern}`", is_expert, by_table=True)
        if template.endswith(".bias"):
            return Role("bias", "name ends in `.bias`")
        for pattern, reason in KEEP_BY_NAME:
            if re.search(pattern, module):
                return Role(reason, f"name rule `{pattern}`")
        return self._by_shape(template, rank, is_weight)

    def _by_shape(self, template: str, rank: int, is_weight: bool) -> Role:
        is_expert = bool(re.search(EXPERT_NAMES, template))
        if rank < 2:
            return Role("one-dimensional", f"{rank} dimensions")
        if rank > 2:
            return Role("not 2-D", f"{rank} dimensions", "expert" in template)
        if not is_weight:
            return Role("not a weight", "name does not end in `.weight`")
        if ".N." not in template:
            return Role("head", "not inside a numbered layer")
        where = f"family {self.family.name} has no rule" if self.family else "unknown family"
        return Role(None, f"{where}: a 2-D `.weight` in a numbered layer", is_expert)
