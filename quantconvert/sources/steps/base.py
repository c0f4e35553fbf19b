"""Steps: what happens to a weight between its encoding and its method, as data.

A step is a frozen dataclass of plain values, so that all of it goes into the plan's digest. It takes part in kept
tensors as well as in quantized ones: a norm that takes a factor is read, changed and written in its own dtype.

Legend: O rows of a block, I columns. A vector counts as one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import QuantConvertError

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.families import Family
    from quantconvert.sources.read import Read
    from quantconvert.sources.rows import Files

# Changes float32 [O, I] in place, given its first row and the half-open range of its columns: some whole rows, or a
# part of each; with axis `rows` all rows of a part of the columns, contiguous.
Change = Callable[["Tensor", int, tuple[int, int]], None]


class Step(ABC):
    """One change of one tensor.

    axis: `columns` where each row is changed by itself, so that any slab of rows can be done alone; `rows` where rows
    mix: all rows of some columns, so that the whole weight is read before its first row is known. passes: how often it
    reads the weight before that, to find what it needs. whole_rows: whether it needs all columns of a row at once.
    scratch: bytes that it takes for each value of a block while it changes it.
    """

    kind: ClassVar[str]
    axis: ClassVar[Literal["columns", "rows"]] = "columns"
    passes: ClassVar[int] = 0
    whole_rows: ClassVar[bool] = False
    scratch: ClassVar[int] = 0

    @property
    def partners(self) -> tuple[TensorRef, ...]:
        """Stored tensors that it looks at; each is also kept or quantized in a place of its own."""
        return ()

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that it holds from the first row to the last of a weight of `shape`."""
        return 0

    @abstractmethod
    def open(self, files: Files) -> Change:
        """Read what it needs, and return what changes a block."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a planner of steps may know: the config, the family's table, and the bytes of small tensors.

    checkpoint: all of the source. changes: keys of config.json that the result has other values of, to be added to.
    """

    config: Mapping[str, Any]
    family: Family | None
    read: Callable[[TensorRef], bytes]
    checkpoint: Checkpoint
    changes: dict[str, Any]


class StepPlanner(Protocol):
    """A kind of step, by name: says which tensors take one.

    plan: the reads with steps added to some, in the same order; what stands against it is appended to `errors`. From
    headers alone, but for small tensors.
    """

    name: str

    def plan(self, reads: Sequence[Read], context: StepContext, errors: list[QuantConvertError]) -> list[Read]: ...
