"""Round to nearest in C, in ranges measured or searched, for every layout whose packing is data.

It takes plain weights as they are stored, with the steps that multiply and divide by factors, from file to file in one
call a unit (`unit.py`), and the rows of all others as float32 (`encode.py`). `quantize.c` is the arithmetic of
`methods/rounding.py`, `search.h` that of `methods/searching.py`, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantconvert.kernels.base import Direct, Fast, Place, Taken, Way
from quantconvert.kernels.native.choice import chosen
from quantconvert.kernels.native.fields import ELEMENTS, STORED
from quantconvert.kernels.native.library import Library
from quantconvert.layouts import Layout
from quantconvert.methods.rtn import Rtn
from quantconvert.methods.search import Search
from quantconvert.schemes import Scheme
from quantconvert.sources import Read
from quantconvert.sources.elements import is_elements
from quantconvert.sources.read import WHOLE
from quantconvert.sources.steps.scale import Scale

if TYPE_CHECKING:
    from quantconvert.checkpoint.ranges import Files
    from quantconvert.sources.rows import Files as Ranges


class Native:
    """The C library, at the level that QUANTCONVERT_KERNEL and the processor say, or at `level` of `library`."""

    name = "native"

    def __init__(self, library: Library | None = None, level: int = 0) -> None:
        self._given = (library, level) if library else None

    @property
    def label(self) -> str | None:
        found = self._found()
        return f"{self.name} ({found[0].levels[found[1]]})" if found else None

    def _found(self) -> tuple[Library, int] | None:
        return self._given or chosen()

    def scratch(self, scheme: Scheme) -> int:
        """Nothing beside what a tile counts anyway: one row as float32, and codes of eight rows at most."""
        return 0

    def find(self, source: Read, method: str, scheme: Scheme, layout: Layout, files: Ranges) -> Fast | None:
        packing, found, stored = layout.packing(scheme), self._found(), takes_stored(source)
        element = source.values.dtype if stored else "F32"
        if found is None or packing is None or not _takes(source, element, method, scheme, layout):
            return None
        from quantconvert.kernels.native.encode import Encoder

        encode = Encoder(*found, source, scheme, layout, packing, files if stored else None, method == Search.name)
        return Fast(encode, stored)

    def takes(self, way: Way) -> Taken:
        source, stored = way.source, takes_stored(way.source)
        if self._found() is None:
            return "nothing"
        if way.method is None or way.scheme is None or way.layout is None:
            fits = source.values.dtype in STORED and way.specs[0].dtype in ELEMENTS and source.view == WHOLE
            return "whole" if stored and fits else "nothing"
        element = source.values.dtype if stored else "F32"
        if way.layout.packing(way.scheme) is None or not _takes(source, element, way.method, way.scheme, way.layout):
            return "nothing"
        alone = way.method == Rtn.name and not way.scheme.static  # nothing has to be known of inputs
        return "whole" if stored and alone else "tiles"

    def direct(self, way: Way, files: Files, places: Mapping[str, Place]) -> Direct:
        from quantconvert.kernels.native.unit import Conversion

        found = self._found()
        assert found is not None, "the caller has asked whether it goes"
        return Conversion(*found, way, files, places)


def _takes(source: Read, element: str, method: str, scheme: Scheme, layout: Layout) -> bool:
    """Whether the arithmetic is the library's, for rows of dtype `element`."""
    fits = element in STORED and {source.dtype, layout.scale_dtype(source.dtype)} <= set(ELEMENTS)
    return fits and method in (Rtn.name, Search.name) and scheme.type == "int" and len(source.shape) == 2


def takes_stored(source: Read) -> bool:
    """Whether the library takes the rows as stored: numbers, times scales of blocks, with no step but factors."""
    is_known = is_elements(source) and source.values.dtype in STORED
    return is_known and all(isinstance(step, Scale) for step in source.steps)
