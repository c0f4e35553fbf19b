"""Steps: a norm gives the power of two in each factor to the columns of what reads it; and pairs of rows mix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantconvert.buffers import bytes_of, torch_dtype
from quantconvert.checkpoint import TensorRef
from quantconvert.errors import QuantConvertError
from quantconvert.sources import Read
from quantconvert.sources.rows import Files
from quantconvert.sources.steps import Change, Step, StepContext

_READERS = (
    (re.compile(r"self_attn\.[qkv]_proj\.weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.(gate|up)_proj\.weight$"), "post_attention_layernorm.weight"),
)


def powers(norm: Tensor) -> Tensor:
    """The power of two below each value: exact in every float type."""
    return torch.exp2(norm.float().abs().log2().floor())


@dataclass(frozen=True, slots=True)
class Fold(Step):
    """Columns times a power of two that the norm holds, or divided by it."""

    norm: TensorRef
    inverse: bool = False

    kind: ClassVar[str] = "toy-fold"

    @property
    def partners(self) -> tuple[TensorRef, ...]:
        return (self.norm,)

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        return 4 * self.norm.num_elements

    def open(self, files: Files) -> Change:
        raw = torch.empty(self.norm.shape, dtype=torch_dtype(self.norm.dtype))
        files.read_into(self.norm.file, bytes_of(raw), self.norm.offset)
        factor = powers(raw)

        def change(w_OI: Tensor, first_row: int, columns: tuple[int, int]) -> None:
            part = factor[slice(*columns)]
            w_OI.div_(part) if self.inverse else w_OI.mul_(part)

        return change


@dataclass(frozen=True, slots=True)
class Butterfly(Step):
    """Rows 2i and 2i+1 become their sum and difference."""

    kind: ClassVar[str] = "toy-butterfly"
    axis: ClassVar[Literal["columns", "rows"]] = "rows"

    def open(self, files: Files) -> Change:
        def change(w_OI: Tensor, first_row: int, columns: tuple[int, int]) -> None:
            even, odd = w_OI[::2].clone(), w_OI[1::2].clone()
            w_OI[::2], w_OI[1::2] = even + odd, even - odd

        return change


class FoldNorms:
    """Which tensors take a `Fold`."""

    name = "toy-fold"

    def plan(self, reads: Sequence[Read], context: StepContext, errors: list[QuantConvertError]) -> list[Read]:
        by_name = {read.name: read for read in reads}
        steps: dict[str, Step] = {}
        for read in reads:
            for pattern, norm_name in _READERS:
                match = pattern.search(read.name)
                norm = by_name.get(read.name[: match.start()] + norm_name) if match else None
                if norm is not None:
                    steps[read.name] = Fold(norm.values)
                    steps[norm.name] = Fold(norm.values, inverse=True)
        return [replace(read, steps=(*read.steps, steps[read.name])) if read.name in steps else read for read in reads]


class MixRows:
    """Every up_proj takes a `Butterfly`."""

    name = "toy-mix"

    def plan(self, reads: Sequence[Read], context: StepContext, errors: list[QuantConvertError]) -> list[Read]:
        return [replace(r, steps=(*r.steps, Butterfly())) if "up_proj" in r.name else r for r in reads]


TOY, MIX = FoldNorms(), MixRows()
