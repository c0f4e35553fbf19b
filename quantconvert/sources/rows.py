"""The rows of a weight [O, I] as float32, a block at a time, whatever it is stored as. Imports torch.

Legend: O rows of the block, I columns, A and B the axes of the stored matrix, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint import TensorRef
from quantconvert.sources.plain import turned_rows
from quantconvert.sources.read import Read, View
from quantconvert.spans import spans


class Files(Protocol):
    """The source's bytes."""

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of `file` on; raises `CheckpointError` where that is not to be had."""
        ...


class Rows(Protocol):
    """Rows of one weight; a vector is one row."""

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        """float32 [last - first, I], exactly the stored values; may be overwritten, and is by the next call.

        columns: these of each row alone, half-open.
        """
        ...

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        """The same rows as they are stored, by role, for kernels that decode themselves; the next call overwrites."""
        ...


def tiles(
    rows: Rows, begin: int, end: int, tile_rows: int, columns: tuple[int, int] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Rows begin..end, a tile at a time: (first row, float32 [O, I]). Each tile overwrites the one before."""
    for first, last in spans(begin, end, tile_rows):
        yield first, rows.rows(first, last, columns)


def read_vector(read: Read, files: Files) -> Tensor:
    """The stored values of a vector [O], of its own or shared with others, in their own dtype."""
    ref, view = read.values, read.view
    dtype = torch_dtype(ref.dtype)
    width = ref.shape[-1]
    raw = torch.empty(width, dtype=dtype)
    files.read_into(ref.file, bytes_of(raw), ref.offset + (view.expert or 0) * width * dtype.itemsize)
    return raw[view.start :: view.step][: read.shape[0]].contiguous()


def matrix_of(read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Matrix:
    """The stored values of a weight."""
    slab_rows = turned_rows(read, slab_nbytes) if read.view.transposed else 0
    return Matrix(read.values, read.view, files, work, slab_rows)


class Matrix:
    """The stored bytes of a view, in their own dtype.

    A tensor of more than three axes counts as [E, A, rest], a vector as one row.
    """

    def __init__(self, ref: TensorRef, view: View, files: Files, work: Workspace, slab_rows: int = 0) -> None:
        self.ref, self.view, self.files, self.work, self.slab_rows = ref, view, files, work, slab_rows
        self.dtype = torch_dtype(ref.dtype)
        inner = ref.shape[1:] if view.expert is not None else ref.shape
        self.height = inner[0] if len(inner) > 1 else 1
        self.width = ref.num_elements // max(1, self.height * (ref.shape[0] if view.expert is not None else 1))
        self.offset = ref.offset + (view.expert or 0) * self.height * self.width * self.dtype.itemsize
        self._slab: Tensor | None = None
        self._held = (0, 0)

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        """[last - first, I] as stored: a view of a buffer that the next call may overwrite."""
        start, step = self.view.start, self.view.step
        begin, end = start + first * step, start + (last - 1) * step + 1
        if self.view.transposed:
            left, right = columns or (0, self.height)
            return self._columns(begin, end)[left:right, ::step].t()
        left, right = columns or (0, self.width)
        return self._block("raw", begin, end, left, right)[::step]

    def _block(self, purpose: str, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Rows top..bottom and columns left..right of the stored matrix, as they are."""
        raw = self.work.tensor(f"{purpose} {self.ref.dtype}", self.dtype, (bottom - top, right - left))
        size = self.dtype.itemsize
        if right - left == self.width:
            self.files.read_into(self.ref.file, bytes_of(raw), self.offset + top * self.width * size)
        else:
            buffer, row = bytes_of(raw), (right - left) * size
            for i in range(bottom - top):
                place = self.offset + ((top + i) * self.width + left) * size
                self.files.read_into(self.ref.file, buffer[i * row : (i + 1) * row], place)
        return raw

    def _columns(self, begin: int, end: int) -> Tensor:
        """[A, end - begin] of the stored matrix; read with as many of the following columns as a slab holds."""
        if self._slab is None or not self._held[0] <= begin <= end <= self._held[1]:
            stop = min(self.width, max(end, begin + self.slab_rows * self.view.step))
            self._slab, self._held = self._block("slab", 0, self.height, begin, stop), (begin, stop)
        return self._slab[:, begin - self._held[0] : end - self._held[0]]


class PlainRows:
    """Ordinary floats, as they are."""

    def __init__(self, matrix: Matrix, work: Workspace) -> None:
        self.matrix, self.work = matrix, work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        raw = self.matrix.rows(first, last, columns)
        return self.work.tensor("float", torch.float32, tuple(raw.shape)).copy_(raw)

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        return {"weight": self.matrix.rows(first, last)}


# 2^(u - 127) for each byte; 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1).
POWERS = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127).float()
POWERS[255] = torch.nan
