"""The registry of encodings, asked in this order; `plain` takes what is left. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

from quantconvert.registry import Registry
from quantconvert.sources.codes import Codes
from quantconvert.sources.encoding import Encoding
from quantconvert.sources.fp8 import Fp8
from quantconvert.sources.modelopt import ModelOpt
from quantconvert.sources.mxfp4 import Mxfp4
from quantconvert.sources.plain import Plain
from quantconvert.sources.read import WHOLE, Cost, Read
from quantconvert.sources.slabs import slabs_of

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows

ENCODINGS: Registry[Encoding] = Registry("encoding", Fp8(), ModelOpt(), Mxfp4(), Codes(), Plain())


def cost_of(read: Read, slab_nbytes: int) -> Cost:
    """What reading a tensor takes, its steps included."""
    cost = ENCODINGS[read.encoding].cost(read, slab_nbytes)
    if not read.steps:
        return cost
    held = sum(step.held_nbytes(read.shape) for step in read.steps)
    held += _mixing(read) * slabs_of(read.matrix, slab_nbytes).held_nbytes
    return replace(cost, raw=cost.raw + max(step.scratch for step in read.steps), held=cost.held + held)


def form_of(read: Read) -> Hashable:
    """What `cost_of` goes by: reads of one form cost the same, whatever they are called and wherever they lie."""
    refs, shape, stored = read.refs, read.shape, read.stored
    kinds = [ref[1:3] for ref in refs.values()]  # dtype and shape
    steps = [(step.axis, step.scratch, step.held_nbytes(shape)) for step in read.steps]
    detail = read.detail if stored is None else stored.form
    return read.encoding, shape, read.dtype, read.view is not WHOLE and read.view, *refs, *kinds, detail, *steps


def scratch_nbytes(read: Read, slab_nbytes: int) -> int:
    """Bytes of a scratch file that reading a tensor takes."""
    return _mixing(read) * slabs_of(read.matrix, slab_nbytes).file_nbytes if read.steps else 0


def _mixing(read: Read) -> int:
    """How many of its steps mix rows."""
    return sum(step.axis == "rows" for step in read.steps)


def open_rows(read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
    """The rows of a tensor, after its steps."""
    rows = ENCODINGS[read.encoding].open(read, files, work, slab_nbytes)
    if not read.steps:
        return rows
    from quantconvert.sources.changes import changed

    return changed(rows, read, files, work, slab_nbytes)
