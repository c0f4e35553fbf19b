"""Reading a weight [O, I] as float32, a block of rows at a time, whatever it is stored as.

Legend: O rows of the block, I columns, A and B the axes of the stored matrix, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quantconvert.checkpoint import TensorRef
from quantconvert.layouts import get_layout
from quantconvert.planning import Execution
from quantconvert.planning.memory import spans, turned_rows
from quantconvert.run.blocks import BlockReader, dequantize
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.sources import Source, View, Weight
from quantconvert.sources.mxfp4 import GROUP, VALUES
from quantconvert.sources.read import WHOLE


class Reader(Protocol):
    """Rows of one weight."""

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        """float32 [last - first, I], exactly the stored values; may be overwritten, and is by the next call.

        columns: these of each row alone, half-open.
        """
        ...


def open_reader(source: Source, files: Files, work: Workspace, execution: Execution) -> Reader:
    """The reader for `source`; scales, and what is stored transposed, are held by it."""
    if isinstance(source, TensorRef):
        return PlainReader(_Matrix(source, WHOLE, files, work), work)
    if source.stored is not None:
        return CodesReader(BlockReader(get_layout(source.layout or ""), source.stored, files, work))
    matrix = _Matrix(source.values, source.view, files, work, turned_rows(source, execution))
    if source.encoding == "fp8":
        return Fp8Reader(source, matrix, files, work)
    if source.encoding == "mxfp4":
        return Mxfp4Reader(matrix, _Matrix(source.refs["scales"], source.view, files, work), work)
    return PlainReader(matrix, work)


def tiles(
    reader: Reader, begin: int, end: int, tile_rows: int, columns: tuple[int, int] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Rows begin..end, a tile at a time: (first row, float32 [O, I]). Each tile overwrites the one before."""
    for first, last in spans(begin, end, tile_rows):
        yield first, reader.rows(first, last, columns)


def read_part(weight: Weight, files: Files) -> Tensor:
    """The stored values of a vector [O] that several share, in their own dtype."""
    ref, view = weight.values, weight.view
    dtype = torch_dtype(ref.dtype)
    width = ref.shape[-1]
    raw = torch.empty(width, dtype=dtype)
    files.read_into(ref.file, bytes_of(raw), ref.offset + (view.expert or 0) * width * dtype.itemsize)
    return raw[view.start :: view.step][: weight.shape[0]].contiguous()


class _Matrix:
    """The stored bytes of a view, in their own dtype. A tensor of more than three axes counts as [E, A, rest]."""

    def __init__(self, ref: TensorRef, view: View, files: Files, work: Workspace, slab_rows: int = 0) -> None:
        self.ref, self.view, self.files, self.work, self.slab_rows = ref, view, files, work, slab_rows
        self.dtype = torch_dtype(ref.dtype)
        inner = ref.shape[1:] if view.expert is not None else ref.shape
        self.height = inner[0] if inner else 1
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


class PlainReader:
    """Ordinary floats, as they are."""

    def __init__(self, matrix: _Matrix, work: Workspace) -> None:
        self.matrix, self.work = matrix, work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        raw = self.matrix.rows(first, last, columns)
        return self.work.tensor("float", torch.float32, tuple(raw.shape)).copy_(raw)


class Fp8Reader(PlainReader):
    """float8 times the scale of its block: formula and source in `quantconvert.sources.fp8`."""

    def __init__(self, weight: Weight, matrix: _Matrix, files: Files, work: Workspace) -> None:
        super().__init__(matrix, work)
        self.view = weight.view
        self.block = weight.block[::-1] if weight.view.transposed else weight.block
        self.scale_AB = self._scale(weight, files)

    def _scale(self, weight: Weight, files: Files) -> Tensor:
        """The matrix of scales, rows along those of the weight; uint8 and float8_e8m0 are exponents."""
        ref, expert = weight.refs["scale"], weight.view.expert
        count = ref.shape[0] if expert is not None else 1
        raw = torch.empty(ref.num_elements // count, dtype=torch_dtype(ref.dtype))
        files.read_into(ref.file, bytes_of(raw), ref.offset + (expert or 0) * (ref.nbytes // count))
        scale = _POWERS[raw.int()] if raw.dtype == torch.uint8 else raw.float()
        height, width = weight.values.shape[-2:]
        shape = (-(-height // weight.block[0]), -(-width // weight.block[1]))
        scale = scale.reshape(shape)
        return scale.t().contiguous() if weight.view.transposed else scale

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        w_OI = super().rows(first, last, columns)
        rows = (self.view.start + self.view.step * torch.arange(first, last)) // self.block[0]
        scale_OG, width = self.scale_AB[rows], self.block[1]
        if columns is not None:
            return w_OI.mul_(scale_OG[:, torch.arange(*columns) // width])
        whole = w_OI.shape[1] // width
        if whole:
            w_OI[:, : whole * width].view(-1, whole, width).mul_(scale_OG[:, :whole].unsqueeze(-1))
        if whole < scale_OG.shape[1]:
            w_OI[:, whole * width :].mul_(scale_OG[:, whole:])
        return w_OI


# 2^(u - 127) for each byte; 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1).
_POWERS = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127).float()
_POWERS[255] = torch.nan
# Both values of each byte, the low nibble's first: [256, 2].
_PAIRS = torch.tensor([[VALUES[byte & 15], VALUES[byte >> 4]] for byte in range(256)])


class Mxfp4Reader:
    """Four-bit floats times a power of two for 32 of them: formula and source in `quantconvert.sources.mxfp4`."""

    def __init__(self, blocks: _Matrix, scales: _Matrix, work: Workspace) -> None:
        self.blocks, self.scales, self.work = blocks, scales, work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        pairs_OP = torch.nn.functional.embedding(self.blocks.rows(first, last).int(), _PAIRS)
        powers_OG = _POWERS[self.scales.rows(first, last).long()]
        w_OI = pairs_OP.view(last - first, -1, GROUP).mul_(powers_OG.unsqueeze(-1)).view(last - first, -1)
        return w_OI[:, slice(*columns)].contiguous() if columns else w_OI


class CodesReader:
    """Integer codes of a layout that we also write."""

    def __init__(self, stored: BlockReader) -> None:
        self.stored = stored

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        begin = first - first % self.stored.row_multiple  # codes or zero points of several rows share a word
        quantized = self.stored.rows(begin, last)
        w_OI = dequantize(quantized, self.stored.stored.scheme, self.stored.column_groups)[first - begin :]
        return w_OI[:, slice(*columns)].contiguous() if columns else w_OI
