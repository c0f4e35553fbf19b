"""Each toy with the registry that it goes into, and the options that choose it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from quantconvert.kernels import KERNELS
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS
from quantconvert.registry import Registry
from quantconvert.sources import ENCODINGS
from quantconvert.sources.steps import STEPS
from tests.joints import encoding, kernel, layout, method, step


@dataclass(frozen=True)
class Toy:
    registry: Registry[Any]
    item: Any
    options: dict[str, Any] = field(default_factory=dict)

    def registered(self) -> AbstractContextManager[Any]:
        return self.registry.added(self.item, first=True)


TOYS = {
    "layout": Toy(LAYOUTS, layout.TOY, {"format": "toy-biased", "scheme": "W4A16_ASYM:g32"}),
    "method": Toy(METHODS, method.TOY, {"method": "toy-clip", "scheme": "W4A16:g32"}),
    "encoding": Toy(ENCODINGS, encoding.TOY, {"requantize": True, "scheme": "W4A16_ASYM:g32"}),
    "step": Toy(STEPS, step.TOY, {"steps": ["toy-fold"], "scheme": "W8A16:g32"}),
    "row step": Toy(STEPS, step.MIX, {"steps": ["toy-mix"], "scheme": "W8A16:g32"}),
    "kernel": Toy(KERNELS, kernel.TOY, {"format": "compressed-tensors", "scheme": "W4A16:g32"}),
}
