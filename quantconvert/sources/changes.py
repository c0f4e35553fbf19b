"""Rows of a weight after its steps. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantconvert.buffers import Scratch, Workspace, bytes_of
from quantconvert.sources.read import Read
from quantconvert.sources.rows import Files, Rows
from quantconvert.sources.slabs import slabs_of
from quantconvert.sources.steps import Change, Step
from quantconvert.spans import spans

# Rows are read ahead in blocks of this many elements where a step mixes them: a tile's, which the plan counts anyway.
_AHEAD_ELEMENTS = 1 << 18


def changed(rows: Rows, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
    """The rows of `read` as its steps leave them."""
    for step in read.steps:
        if step.axis == "columns":
            rows = _ChangedRows(rows, step, files)
        elif slabs_of(read.matrix, slab_nbytes).is_held:
            rows = _HeldRows(rows, read, step.open(files), work, slab_nbytes)
        else:
            rows = _FiledRows(rows, read, step.open(files), work, slab_nbytes)
    return rows


class _ChangedRows:
    """A step that changes each row by itself."""

    def __init__(self, rows: Rows, step: Step, files: Files) -> None:
        self.inner, self.change, self.whole_rows = rows, step.open(files), step.whole_rows

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        if columns and self.whole_rows:
            return self.rows(first, last)[:, slice(*columns)].contiguous()
        w_OI = self.inner.rows(first, last, columns)
        self.change(w_OI, first, columns or (0, w_OI.shape[1]))
        return w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        raise NotImplementedError("what a step has changed is nowhere stored")


class _HeldRows:
    """A step that mixes rows: the whole weight is read, changed a part of its columns at a time, and held."""

    def __init__(self, rows: Rows, read: Read, change: Change, work: Workspace, slab_nbytes: int) -> None:
        count, width = read.matrix
        self.held = torch.empty(count, width)
        for first, last in spans(0, count, max(1, _AHEAD_ELEMENTS // max(1, width))):
            self.held[first:last] = rows.rows(first, last)
        for left, right in spans(0, width, slabs_of(read.matrix, slab_nbytes).columns):
            part = work.tensor("columns", torch.float32, (count, right - left))
            change(part.copy_(self.held[:, left:right]), 0, (left, right))
            self.held[:, left:right] = part
        self.work = work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        part = self.held[first:last, slice(*columns)] if columns else self.held[first:last]
        return self.work.tensor("float", torch.float32, tuple(part.shape)).copy_(part)

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        raise NotImplementedError("what a step has changed is nowhere stored")


class _FiledRows:
    """A step that mixes rows of a weight too large to hold: it lies in a scratch file, part after part of its columns,
    so that a part, and some rows of a part, are one range of bytes.
    """

    def __init__(self, rows: Rows, read: Read, change: Change, work: Workspace, slab_nbytes: int) -> None:
        self.count, self.width = read.matrix
        self.parts = list(spans(0, self.width, slabs_of(read.matrix, slab_nbytes).columns))
        self.work, self.file = work, Scratch(work.folder)
        for first, last in spans(0, self.count, max(1, _AHEAD_ELEMENTS // max(1, self.width))):
            w_OI = rows.rows(first, last)
            for left, right in self.parts:
                block = self._block(last - first, right - left).copy_(w_OI[:, left:right])
                self.file.write(bytes_of(block), self._offset(first, left, right))
        for left, right in self.parts:
            part, offset = self._block(self.count, right - left), self._offset(0, left, right)
            self.file.read_into(bytes_of(part), offset)
            change(part, 0, (left, right))
            self.file.write(bytes_of(part), offset)

    def _block(self, rows: int, columns: int) -> Tensor:
        return self.work.tensor("columns", torch.float32, (rows, columns))

    def _offset(self, row: int, left: int, right: int) -> int:
        return 4 * (left * self.count + row * (right - left))

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        begin, end = columns or (0, self.width)
        w_OI = self.work.tensor("float", torch.float32, (last - first, end - begin))
        for left, right in self.parts:
            if left < end and begin < right:
                block = self._block(last - first, right - left)
                self.file.read_into(bytes_of(block), self._offset(first, left, right))
                inner = slice(max(left, begin) - left, min(right, end) - left)
                w_OI[:, max(left, begin) - begin : min(right, end) - begin] = block[:, inner]
        return w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        raise NotImplementedError("what a step has changed is nowhere stored")
