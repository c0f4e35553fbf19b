"""What a decider hands on: one decision a tensor, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.engines import PLAIN, Loadable, own_names
from quantconvert.factors import Factors
from quantconvert.families import Classifier
from quantconvert.job import Job
from quantconvert.layouts import Layout, Selection
from quantconvert.planning.decision import Decision
from quantconvert.planning.knowledge import Knowledge
from quantconvert.planning.lower import Lowering
from quantconvert.schemes import Scheme
from quantconvert.sources import Sources
from quantconvert.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Decided:
    """Everything that lowering and placing need. plain_dtype: the float type of a result without a layout."""

    checkpoint: Checkpoint
    job: Job
    classifier: Classifier
    sources: Sources
    decisions: Sequence[Decision]
    lowering: Lowering
    reason: str
    notes: tuple[str, ...]
    selection: Selection
    loadable: Loadable
    plain_dtype: str | None = None
    factors: Factors | None = None
    knowledge: Knowledge | None = None
    statistics: Statistics | None = None

    @property
    def layout(self) -> Layout | None:
        return self.lowering.layout

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The `quantization_config` of the result."""
        return None if self.layout is None else self.layout.config(self.selection)


def select(decisions: Sequence[Decision], lowering: Lowering, classifier: Classifier) -> Selection:
    """What the config block has to tell: which modules have which scheme, and which were left alone."""
    schemes: dict[int, tuple[Scheme, list[str]]] = {}  # by `id`: equal ones are one object
    for d in decisions:
        scheme = lowering.scheme(d)
        if scheme is not None:
            (schemes.get(id(scheme)) or schemes.setdefault(id(scheme), (scheme, [])))[1].append(d.module)
    left = [d for d in decisions if d.reason is not None]
    kept = [d.module for d in left if d.is_kept_linear]
    kept += [d.module.rpartition(".")[0] for d in left if d.is_kept_experts]
    return Selection(
        schemes={scheme: tuple(modules) for scheme, modules in schemes.values()},
        kept=tuple(dict.fromkeys(kept)),
        fused=classifier.fused,
        has_experts=any(d.is_expert for d in decisions),
        tied=classifier.tied,
        own_names=own_names(classifier.model_type),
    )


def meets(checkpoint: Checkpoint, classifier: Classifier, has_experts: bool) -> Loadable:
    """The result as engines meet it, but for its layout and schemes."""
    names = checkpoint.config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    family = classifier.family.name if classifier.family else None
    return Loadable(PLAIN, (), family, has_experts, architecture)
