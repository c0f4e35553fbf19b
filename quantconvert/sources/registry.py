"""The registry of encodings, asked in this order; `plain` takes what is left. A new one is a file and a line here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantconvert.registry import Registry
from quantconvert.sources.codes import Codes
from quantconvert.sources.encoding import Encoding
from quantconvert.sources.fp8 import Fp8
from quantconvert.sources.mxfp4 import Mxfp4
from quantconvert.sources.plain import Plain
from quantconvert.sources.read import Cost, Read

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows

ENCODINGS: Registry[Encoding] = Registry("encoding", Fp8(), Mxfp4(), Codes(), Plain())


def cost_of(read: Read, slab_nbytes: int) -> Cost:
    """What reading a tensor takes, its steps included."""
    cost = ENCODINGS[read.encoding].cost(read, slab_nbytes)
    held = sum(step.held_nbytes(read.shape) for step in read.steps)
    held += sum(4 * read.num_elements for step in read.steps if step.axis == "rows")
    return replace(cost, held=cost.held + held) if held else cost


def open_rows(read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
    """The rows of a tensor, after its steps."""
    rows = ENCODINGS[read.encoding].open(read, files, work, slab_nbytes)
    if not read.steps:
        return rows
    from quantconvert.sources.changes import changed

    return changed(rows, read, files, work)
