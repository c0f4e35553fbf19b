"""What every kernel must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from quantconvert.layouts import Layout
from quantconvert.methods import Noise
from quantconvert.schemes import Scheme
from quantconvert.sources import Read

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.sources.rows import Files

# The rows of a tile by role, the number of the first, what the method's first pass found, where the error is added;
# blocks by suffix, row axis first (as `Layout.encode`). May raise the method's exceptions.
Encode = Callable[[Mapping[str, "Tensor"], int, Any, Noise], "dict[str, Tensor]"]


class Fast(NamedTuple):
    """A fast path. stored: it takes rows as they are stored (`Rows.raw`), and does the steps of the source itself;
    else `weight` alone, float32 after all steps, which it may overwrite.
    """

    encode: Encode
    stored: bool


class Kernel(Protocol):
    """A fast path for some combinations. label: what it is here, for people; None where it does not run."""

    name: str

    @property
    def label(self) -> str | None: ...

    def scratch(self, scheme: Scheme) -> int:
        """Bytes that it takes for each value of a tile, beside the tile itself."""
        ...

    def find(self, source: Read, method: str, scheme: Scheme, layout: Layout, files: Files) -> Fast | None:
        """The callable for a weight; None where this kernel has none. files: where what steps need is read."""
        ...
