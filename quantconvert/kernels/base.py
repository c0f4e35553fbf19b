"""What every kernel must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from quantconvert.layouts import Layout, TensorSpec
from quantconvert.methods import Noise
from quantconvert.schemes import Scheme
from quantconvert.sources import Read

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint.ranges import Files
    from quantconvert.sources.rows import Files as Ranges

# The rows of a tile by role, the number of the first, what the method's first pass found, where the error is added;
# blocks by suffix, row axis first (as `Layout.encode`). May raise the method's exceptions.
Encode = Callable[[Mapping[str, "Tensor"], int, Any, Noise], "dict[str, Tensor]"]


class Fast(NamedTuple):
    """A fast path. stored: it takes rows as they are stored (`Rows.raw`), and does the steps of the source itself;
    else `weight` alone, float32 after all steps, which it may overwrite.
    """

    encode: Encode
    stored: bool


class Way(NamedTuple):
    """What becomes of a weight: codes by a method, in a layout; without these, plain numbers of `specs[0].dtype`.

    specs: of the result's tensors. tile_rows: rows of which the error is summed, and sums of bytes are taken.
    """

    source: Read
    specs: tuple[TensorSpec, ...]
    tile_rows: int
    method: str | None = None
    scheme: Scheme | None = None
    layout: Layout | None = None


Taken = Literal["whole", "tiles", "nothing"]


class Place(NamedTuple):
    """Where a tensor of the result goes: an open file, and how many bytes from its start."""

    fd: int
    offset: int


class Written(NamedTuple):
    """What a unit wrote. sums: by suffix, of what `run.pieces` calls a tensor's pieces, added up modulo 2^64; of a
    tensor of which the unit is only a part of each row, 0. noise, signal: of each tile, as `Noise` has them.
    """

    sums: Mapping[str, int]
    noise: Sequence[float]
    signal: Sequence[float]


class Unwritten(Exception):
    """The tensor of suffix `args[1]` could not be written, for the errno `args[0]`."""


class Unread(Exception):
    """The source could not be read; reading it again says why."""


class Direct(Protocol):
    """A weight's whole way, from the source's file into the result's, a unit of its rows at a time; for several
    threads at once.
    """

    def nbytes(self, begin: int, end: int) -> int:
        """Bytes of the buffer that rows begin..end need."""
        ...

    def convert(self, begin: int, end: int, buffer: memoryview) -> Written:
        """Convert rows begin..end. Raises the method's exceptions (`NonFinite` also where plain numbers are not finite
        as they are written), `Unread` and `Unwritten`.
        """
        ...


class Kernel(Protocol):
    """A fast path for some combinations. label: what it is here, for people; None where it does not run."""

    name: str

    @property
    def label(self) -> str | None: ...

    def scratch(self, scheme: Scheme) -> int:
        """Bytes that it takes for each value of a tile, beside the tile itself."""
        ...

    def find(self, source: Read, method: str, scheme: Scheme, layout: Layout, files: Ranges) -> Fast | None:
        """The callable for a weight; None where this kernel has none. files: where what steps need is read."""
        ...

    def takes(self, way: Way) -> Taken:
        """How much of a weight's way is this kernel's: by `direct`, if its file is on this machine, or by `find`."""
        ...

    def direct(self, way: Way, files: Files, places: Mapping[str, Place]) -> Direct:
        """The weight's whole way, where it is taken whole; places: by suffix. Raises `NonFinite`."""
        ...
