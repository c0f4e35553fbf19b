"""The narrow waist on the way in: whatever the stored bytes look like, planning sees weights [O, I] by module name.

Legend: O out_features, I in_features, E experts, A and B the axes of a stored matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from quantconvert.checkpoint import TensorRef
from quantconvert.dtypes import DTYPES
from quantconvert.layouts import Stored
from quantconvert.patterns import WEIGHT_SUFFIX

Encoding = Literal["plain", "fp8", "mxfp4", "codes"]


@dataclass(frozen=True, slots=True)
class View:
    """Where a weight lies in the stored tensor, of shape [A, B] or, with experts, [E, A, B].

    `expert`: the index on the first axis; None where the tensor is one matrix. The weight's rows are `start`,
    `start + step`, ... of axis A, or of axis B where the matrix is stored `transposed` ([in, out]).
    """

    expert: int | None = None
    start: int = 0
    step: int = 1
    transposed: bool = False


WHOLE = View()


@dataclass(frozen=True, slots=True)
class Weight:
    """A linear weight [O, I], or with `view` alone a vector [O], that is read from stored tensors in its own way.

    name: that of a plain tensor of the same content (`M.weight`). dtype: the float type that its scales are rounded to
    and that it has when it is written without being quantized. refs: every tensor it is read from, by role; the one
    with the values comes first. parts: how many weights share these tensors; together they cover them exactly.
    num_bits: of the stored values, None unless they are quantized. block: (rows, columns) of the stored matrix that
    share one fp8 scale. stored: what a layout of ours says of integer codes, `layout` its name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: Encoding
    refs: Mapping[str, TensorRef]
    view: View = WHOLE
    parts: int = 1
    num_bits: int | None = None
    block: tuple[int, int] = (1, 1)
    stored: Stored | None = field(default=None, repr=False)
    layout: str | None = None

    @property
    def values(self) -> TensorRef:
        """The stored tensor that holds the values."""
        return next(iter(self.refs.values()))

    @property
    def module(self) -> str:
        return self.name.removesuffix(WEIGHT_SUFFIX)

    @property
    def file(self) -> str:
        """The file of the values; partners may lie in others."""
        return self.values.file

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its share of the stored bytes, partners included (rounded down where weights share them)."""
        return sum(ref.nbytes for ref in self.refs.values()) // self.parts

    @property
    def row_nbytes(self) -> int:
        """Bytes of the stored values that have to be read for one row [I]."""
        return self.shape[-1] * self.view.step * DTYPES[self.values.dtype].bits // 8

    @property
    def held_nbytes(self) -> int:
        """Bytes that a reader takes for scales, from the first row to the last: as stored, as indexes, as float32."""
        if self.encoding != "fp8":
            return 0
        scale = self.refs["scale"]
        return 16 * (scale.num_elements // (scale.shape[0] if self.view.expert is not None else 1))

    @property
    def bytes_per_element(self) -> int:
        """Bytes of a block's raw form beside float32, for each weight in it."""
        if self.encoding == "codes":
            return 4
        raw = DTYPES[self.values.dtype].bits * self.view.step // 8
        return 4 * self.view.step if self.encoding == "mxfp4" else raw


# What planning decides on: a stored tensor as it is, or a weight that is read in its own way.
Source = TensorRef | Weight


def refs_of(source: Source) -> tuple[TensorRef, ...]:
    """Every stored tensor that `source` is read from."""
    return tuple(source.refs.values()) if isinstance(source, Weight) else (source,)


def bits_of(source: Source) -> int | None:
    """The bits of its values where `source` is quantized, else None."""
    return source.num_bits if isinstance(source, Weight) else None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A stored tensor that the result does not need, and why."""

    ref: TensorRef
    reason: str


@dataclass(frozen=True, slots=True)
class Sources:
    """All of a checkpoint's tensors as planning sees them, in the order of their bytes.

    method: the quantization that the source has, as its config or its tensors call it; None for a plain one.
    """

    tensors: tuple[Source, ...]
    dropped: tuple[Dropped, ...] = ()
    method: str | None = None
