"""The narrow waist on the way in: whatever the stored bytes look like, planning sees how each tensor is read.

Legend: O out_features, I in_features, E experts, A and B the axes of a stored matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from quantconvert.checkpoint import TensorRef
from quantconvert.frozen import frozen
from quantconvert.layouts import Stored
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources.steps.base import Step

PLAIN = "plain"


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


@frozen
class Read:
    """How one tensor of the model is read: a weight [O, I], or anything else as it is stored.

    name: that of a plain tensor of the same content (`M.weight`). dtype: the float type that its scales are rounded to
    and that it has when it is written without being quantized. encoding: the name of a registered one. refs: every
    stored tensor it is read from, by role; the one with the values comes first. parts: how many reads share these
    tensors; together they cover them exactly. num_bits: of the stored values, None unless they are quantized. detail:
    what the encoding keeps for itself. steps: what happens to the values on their way, in order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    refs: Mapping[str, TensorRef]
    view: View = WHOLE
    parts: int = 1
    num_bits: int | None = None
    detail: Any = None
    steps: tuple[Step, ...] = ()

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
    def matrix(self) -> tuple[int, int]:
        """Its shape [O, I] as rows are read: a vector is one row."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (1, self.num_elements)

    @property
    def nbytes(self) -> int:
        """Its share of the stored bytes, partners included (rounded down where reads share them)."""
        return sum([ref.nbytes for ref in self.refs.values()]) // self.parts

    @property
    def stored(self) -> Stored | None:
        """What a layout of ours says of integer codes; None for every other encoding."""
        return self.detail if isinstance(self.detail, Stored) else None

    @property
    def is_stored(self) -> bool:
        """Whether the stored bytes of one tensor are the value, so that they can be copied."""
        return self.encoding == PLAIN and self.view == WHOLE and self.parts == 1 and not self.steps

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor whose bytes end here, the one with the values first."""
        return tuple(self.refs.values())

    @property
    def partners(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that steps look at; it ends in a place of its own."""
        return tuple(ref for step in self.steps for ref in step.partners)

    def stepped(self, steps: tuple[Step, ...]) -> Read:
        """The same with more steps at the end. (Spelled out: `replace` takes four times as long, of each weight.)"""
        own = self.name, self.shape, self.dtype, self.encoding, self.refs, self.view, self.parts, self.num_bits
        return Read(*own, self.detail, (*self.steps, *steps))


def as_stored(ref: TensorRef) -> Read:
    """A stored tensor as it is."""
    return Read(ref.name, ref.shape, ref.dtype, PLAIN, {"weight": ref})


@dataclass(frozen=True, slots=True)
class Cost:
    """What reading takes beside tiles of float32: bytes of the raw form for each element of a tile, bytes held
    throughout, and bytes for each row of a slab of `slab_rows` (or of a tile, if that is more) where the values are
    stored transposed. row_multiple: rows can be read from multiples of this on, as several share a word.
    """

    raw: int
    held: int = 0
    row_nbytes: int = 0
    slab_rows: int = 0
    row_multiple: int = 1


@dataclass(frozen=True, slots=True)
class Dropped:
    """A stored tensor that the result does not need, and why."""

    ref: TensorRef
    reason: str


@dataclass(frozen=True, slots=True)
class Sources:
    """All of a checkpoint's tensors as planning sees them, in the order of their bytes.

    method: the quantization that the source has, as its config or its tensors call it; None for a plain one. changes:
    keys of config.json that the result has other values of, as steps ask.
    """

    reads: tuple[Read, ...]
    dropped: tuple[Dropped, ...] = ()
    method: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
