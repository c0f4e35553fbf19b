"""Round to nearest in C: one call from rows to packed codes, for every layout whose packing is data.

It takes plain weights as they are stored, with the steps that multiply and divide by factors, and the rows of all
others as float32. `quantize.c` is the arithmetic of `methods/rounding.py`, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantconvert.kernels.base import Fast
from quantconvert.kernels.native.choice import chosen
from quantconvert.kernels.native.library import ELEMENTS, Library
from quantconvert.layouts import Layout
from quantconvert.methods.rtn import Rtn
from quantconvert.schemes import Scheme
from quantconvert.sources import Read
from quantconvert.sources.read import PLAIN
from quantconvert.sources.steps.scale import Scale

if TYPE_CHECKING:
    from quantconvert.sources.rows import Files


class Native:
    """The C library, at the level that QUANTCONVERT_KERNEL and the processor say, or at `level` of `library`."""

    name = "native"

    def __init__(self, library: Library | None = None, level: int = 0) -> None:
        self._given = (library, level) if library else None

    @property
    def label(self) -> str | None:
        found = self._given or chosen()
        return f"{self.name} ({found[0].levels[found[1]]})" if found else None

    def scratch(self, scheme: Scheme) -> int:
        """Nothing beside what a tile counts anyway: one row as float32, and codes of eight rows at most."""
        return 0

    def find(self, source: Read, method: str, scheme: Scheme, layout: Layout, files: Files) -> Fast | None:
        packing = layout.packing(scheme)
        stored = takes_stored(source)
        takes = (source.dtype, layout.scale_dtype(source.dtype), source.values.dtype if stored else "F32")
        found = self._given or chosen()
        if found is None or packing is None or method != Rtn.name or scheme.type != "int":
            return None
        if len(source.shape) != 2 or not set(takes) <= set(ELEMENTS):
            return None
        from quantconvert.kernels.native.encode import Encoder

        return Fast(Encoder(*found, source, scheme, layout, packing, files if stored else None), stored)


def takes_stored(source: Read) -> bool:
    """Whether the library takes the rows as stored: of a plain weight, with no step but factors of columns and rows."""
    factors = (isinstance(step, Scale) and step.way in ("columns", "rows") for step in source.steps)
    return source.encoding == PLAIN and all(factors)
