"""Plain tensors: the stored values are the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantconvert.dtypes import DTYPES
from quantconvert.sources.encoding import Context
from quantconvert.sources.read import PLAIN, Cost, Read, as_stored

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows


def row_nbytes(read: Read) -> int:
    """Bytes of the stored values that have to be read for one row [I] of a view."""
    return read.shape[-1] * read.view.step * DTYPES[read.values.dtype].bits // 8


def turned_rows(read: Read, slab_nbytes: int) -> int:
    """Rows of a weight that is stored transposed which its reader takes in at once."""
    return max(1, min(read.shape[0], slab_nbytes // max(1, row_nbytes(read))))


def view_cost(read: Read, slab_nbytes: int, raw: int, held: int = 0) -> Cost:
    """The cost of a view: `raw` bytes for each element of a tile, and a slab where the matrix is stored transposed."""
    if not read.view.transposed:
        return Cost(raw, held)
    return Cost(raw, held, row_nbytes(read), turned_rows(read, slab_nbytes))


class Plain:
    """Whatever no other encoding takes."""

    name = PLAIN
    out_first = False
    by_rows = True
    methods: tuple[str, ...] = ()

    def find(self, context: Context) -> Iterator[Read]:
        """Each tensor, as it is."""
        return map(as_stored, context.refs.values())

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        """The stored bytes beside their float32."""
        return view_cost(read, slab_nbytes, DTYPES[read.values.dtype].bits * read.view.step // 8)

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        """Rows of the view; a vector is one row."""
        from quantconvert.sources.rows import PlainRows, matrix_of

        return PlainRows(matrix_of(read, files, work, slab_nbytes), work)
