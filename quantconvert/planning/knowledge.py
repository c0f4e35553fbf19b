"""What is known of the inputs of a conversion's weights, as a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantconvert.checkpoint import TensorRef
from quantconvert.factors import VectorFile
from quantconvert.planning.tasks import UNKNOWN, Known

if TYPE_CHECKING:
    from quantconvert.factors.walk import Walk


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known, by module; and the bag of tokens that finds it, where nothing else does, with its file."""

    modules: Mapping[str, Known] = field(default_factory=dict)
    walk: Walk | None = None
    file: VectorFile | None = None

    def of(self, module: str) -> Known:
        """What is known of one module's input."""
        return self.modules.get(module, UNKNOWN)

    def importances(self, modules: Iterable[str]) -> tuple[TensorRef, ...]:
        """Of the inputs of several modules, each input once."""
        return tuple(dict.fromkeys(ref for module in modules if (ref := self.of(module).importance)))

    def maxima(self, modules: Iterable[str]) -> tuple[TensorRef, ...]:
        """The same of max |x_j|."""
        return tuple(dict.fromkeys(ref for module in modules if (ref := self.of(module).maxima)))
