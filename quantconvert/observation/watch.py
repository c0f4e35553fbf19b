"""Sums over what linear layers read, taken by hooks. Imports torch.

Legend: T tokens of one call, I columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantconvert.errors import CheckpointError


class CalledAgain(Exception):
    """A layer whose sums were taken away runs once more."""


@dataclass(slots=True)
class Sums:
    """Of one input: sums of squares in float64 [I], maxima [I], sums of products [I, I] in float32 if asked for, and
    the number of tokens.
    """

    squares: Tensor
    largest: Tensor
    products: Tensor | None
    count: int = 0

    @classmethod
    def of(cls, width: int, moments: bool) -> Sums:
        products = torch.zeros(width, width) if moments else None
        return cls(torch.zeros(width, dtype=torch.float64), torch.zeros(width), products)

    def add(self, x_TI: Tensor) -> None:
        """Take in the input of one call."""
        x_TI = x_TI.float()
        self.count += len(x_TI)
        self.squares += x_TI.square().sum(0, dtype=torch.float64)
        torch.maximum(self.largest, x_TI.abs().amax(0), out=self.largest)
        if self.products is not None:
            self.products.addmm_(x_TI.t(), x_TI)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The statistics by kind, float32; raises `CheckpointError` where the model ran into NaN or infinity."""
        found = {
            "second_moment": (self.squares / self.count).float(),
            "channel_max": self.largest,
            "max": self.largest.amax().reshape(1),
        }
        if self.products is not None:
            self.products /= self.count
            found["moments"] = (self.products + self.products.t()) / 2
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
            raise CheckpointError(f"the input of `{name}` holds NaN or Inf while the model runs in float32")
        return found


class SharedNotAlways(Exception):
    """Modules that read one input in some calls read others in other calls. kind: the last part of the one's name that
    must be summed by itself.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kind = name.rpartition(".")[2]


@dataclass(slots=True)
class Watch:
    """Hooks on modules, each with the name that its statistics bear; inputs that modules share are summed once.

    alone: last parts of the names of modules that do not share. inputs: the name under which each module's input is
    summed, once it has run.
    """

    moments: bool
    alone: frozenset[str] = frozenset()
    inputs: dict[str, str] = field(default_factory=dict)
    _sums: dict[str, Sums] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _calls: Counter[str] = field(default_factory=Counter)
    _seen: dict[tuple[int, int, int], tuple[str, Tensor]] = field(default_factory=dict)

    def add(self, modules: Mapping[str, tuple[nn.Module, int]]) -> list[RemovableHandle]:
        """Watch modules by name, given with in_features, until the handles are removed."""
        return [
            module.register_forward_pre_hook(self._hook(name, width), with_kwargs=True)
            for name, (module, width) in modules.items()
        ]

    def _hook(self, name: str, width: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None and x.numel() and x.shape[-1] == width and not x.is_meta:
                self._see(name, x.detach(), width)

        return see

    def _see(self, name: str, x: Tensor, width: int) -> None:
        owner = name
        if name.rpartition(".")[2] not in self.alone:
            owner = self._seen.setdefault((x.data_ptr(), x.numel(), x._version), (name, x))[0]
        summed = self.inputs.setdefault(name, owner)
        self._calls[name] += 1
        if summed == name:
            if name in self._taken:
                raise CalledAgain(name)
            self._sums.setdefault(name, Sums.of(width, self.moments)).add(x.reshape(-1, width))
        elif summed != owner:
            raise SharedNotAlways(name)

    def forget(self) -> None:
        """After a call of the model or a layer: what was seen in it is gone, and its memory may be another's.

        Raises `SharedNotAlways` where a module did not read all that was summed for it.
        """
        for name, count in self._calls.items():
            if self._calls[self.inputs[name]] != count:
                raise SharedNotAlways(name)
        self._calls.clear()
        self._seen.clear()

    def take(self) -> dict[str, Sums]:
        """All sums since the last time; their modules must not run again."""
        sums, self._sums = self._sums, {}
        self._taken |= sums.keys()
        return sums
