"""Rows of a weight after its steps. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantconvert.buffers import Workspace
from quantconvert.sources.read import Read
from quantconvert.sources.rows import Files, Rows
from quantconvert.sources.steps import Step
from quantconvert.spans import spans

# Rows are read ahead in blocks of this many elements where a step mixes them: a tile's, which the plan counts anyway.
_AHEAD_ELEMENTS = 1 << 18


def changed(rows: Rows, read: Read, files: Files, work: Workspace) -> Rows:
    """The rows of `read` as its steps leave them."""
    for step in read.steps:
        rows = _MixedRows(rows, read, step, files, work) if step.axis == "rows" else _ChangedRows(rows, step, files)
    return rows


class _ChangedRows:
    """A step that changes each row by itself."""

    def __init__(self, rows: Rows, step: Step, files: Files) -> None:
        self.inner, self.change = rows, step.open(files)

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        w_OI = self.inner.rows(first, last, columns)
        self.change(w_OI, first, columns or (0, w_OI.shape[1]))
        return w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        raise NotImplementedError("what a step has changed is nowhere stored")


class _MixedRows:
    """A step that mixes rows: the whole weight is read and changed once, and held."""

    def __init__(self, rows: Rows, read: Read, step: Step, files: Files, work: Workspace) -> None:
        count, width = read.matrix
        self.held = torch.empty(count, width)
        for first, last in spans(0, count, max(1, _AHEAD_ELEMENTS // max(1, width))):
            self.held[first:last] = rows.rows(first, last)
        step.open(files)(self.held, 0, (0, width))
        self.work = work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        part = self.held[first:last, slice(*columns)] if columns else self.held[first:last]
        return self.work.tensor("float", torch.float32, tuple(part.shape)).copy_(part)

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        raise NotImplementedError("what a step has changed is nowhere stored")
