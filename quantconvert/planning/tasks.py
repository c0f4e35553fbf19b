"""Tasks: the unit of execution, memory and resume. A closed union; `run.work` is where kinds are told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from quantconvert.checkpoint import TensorRef
from quantconvert.families import Reason
from quantconvert.frozen import frozen
from quantconvert.layouts import TensorSpec
from quantconvert.schemes import Scheme
from quantconvert.sources import Read

Operation = Literal["copy", "split", "quantize", "repack", "dequantize"]
COPY_CHUNK_NBYTES = 4_000_000


class Output(NamedTuple):
    """One tensor of the result, and its place: `offset` bytes from the start of the file of shard `shard`.

    spec: what a layout promises for `module`; one with an empty suffix is a tensor of the model under its own name.
    """

    spec: TensorSpec
    module: str
    shard: int
    offset: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.spec.suffix}" if self.spec.suffix else self.module

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def offset_of_row(self, row: int) -> int:
        """Bytes from the tensor's start to row `row` of its first axis."""
        return row * (self.spec.nbytes // self.spec.shape[0]) if row else 0


class Known(NamedTuple):
    """Where it stands what is known of a weight's input x, as the source's model has it: E[x_j^2] [I], E[x x^T] [I, I],
    max |x_j| [I], all float32.
    """

    importance: TensorRef | None = None
    moments: TensorRef | None = None
    maxima: TensorRef | None = None


UNKNOWN = Known()


@dataclass(frozen=True, slots=True)
class Cut:
    """How one weight is cut: rows of a tile, and of a slab, which one worker carries out at once; the bytes that this
    needs at its peak. Tiles do not depend on the number of workers.
    """

    tile_rows: int
    slab_rows: int
    peak_nbytes: int


@frozen
class _Task:
    """What all tasks have: what is read, where the result goes, and the evidence for what is done."""

    source: Read
    outputs: tuple[Output, ...]
    evidence: str

    operation: ClassVar[Operation]
    # Whether its bytes are journalled with checksums; a copy is compared with the source, which says more.
    has_sums: ClassVar[bool] = True

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor whose bytes end in this task, the one with the values first."""
        return self.source.inputs

    @property
    def num_elements(self) -> int:
        """Weights, unpacked."""
        return self.source.num_elements

    @property
    def output_nbytes(self) -> int:
        return sum(output.spec.nbytes for output in self.outputs)


@frozen
class Copy(_Task):
    """A stored tensor as it is, byte by byte."""

    reason: Reason

    operation: ClassVar[Operation] = "copy"
    has_sums: ClassVar[bool] = False
    scheme: ClassVar[None] = None

    @property
    def peak_nbytes(self) -> int:
        return min(self.source.nbytes, COPY_CHUNK_NBYTES)


@frozen
class Split(_Task):
    """One vector of several that are stored in one tensor, as it is."""

    reason: Reason

    operation: ClassVar[Operation] = "split"
    scheme: ClassVar[None] = None

    @property
    def peak_nbytes(self) -> int:
        return min(self.source.nbytes, COPY_CHUNK_NBYTES)


@frozen
class Quantize(_Task):
    """A weight as codes, by a method, in a layout.

    input_max: max |x| of its input, where that gets a stored scale. known: what the method is told. siblings: weights
    that engines load with it as one layer, where something of the scales is found over all of them.
    """

    scheme: Scheme
    method: str
    layout: str
    cut: Cut
    input_max: float | None = None
    known: Known = UNKNOWN
    siblings: tuple[Read, ...] = ()

    operation: ClassVar[Operation] = "quantize"
    reason: ClassVar[None] = None

    @property
    def peak_nbytes(self) -> int:
        return self.cut.peak_nbytes


@frozen
class Repack(_Task):
    """Stored codes in another layout."""

    scheme: Scheme
    layout: str
    cut: Cut

    operation: ClassVar[Operation] = "repack"
    reason: ClassVar[None] = None

    @property
    def peak_nbytes(self) -> int:
        return self.cut.peak_nbytes


@frozen
class Decode(_Task):
    """A tensor as plain numbers: decoded, after its steps, rounded once. reason: why it is kept, if it is."""

    reason: Reason | None
    cut: Cut

    operation: ClassVar[Operation] = "dequantize"
    scheme: ClassVar[None] = None

    @property
    def peak_nbytes(self) -> int:
        return self.cut.peak_nbytes


Task = Copy | Split | Quantize | Repack | Decode

# Why a linear weight may stay as it is although it could be quantized.
_NOT_ROLES = (None, "ignored", "indivisible", "unaligned", "non-finite", "plain")


def role_of(task: Task) -> str:
    """What the tensor is in the model: `linear`, `expert`, or what it is kept for."""
    if task.reason in _NOT_ROLES:
        return "expert" if ".experts." in task.source.name else "linear"
    return str(task.reason)
