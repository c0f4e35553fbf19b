"""Fast paths: one callable from stored rows to encoded blocks, in place of decode, quantize and encode.

`find_kernel` gives the first registered kernel that takes a weight, or nothing: then the three calls run, which are the
reference. A kernel gives the same bytes and the same noise, to the bit; the equivalence test runs over whatever is
registered. None is yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from quantconvert.layouts import Layout
from quantconvert.methods import Method, Noise
from quantconvert.registry import Registry
from quantconvert.schemes import Scheme
from quantconvert.sources import Read

if TYPE_CHECKING:
    from torch import Tensor

# The stored rows of a tile by role (`Rows.raw`), what the method's first pass found, where the error is added;
# blocks by suffix, row axis first (as `Layout.encode`). May raise the method's exceptions.
Encode = Callable[[Mapping[str, "Tensor"], Any, Noise], "dict[str, Tensor]"]


class Kernel(Protocol):
    """A fast path for some combinations."""

    name: str

    def scratch(self, scheme: Scheme) -> int:
        """Bytes that it takes for each value of a tile, beside the tile itself."""
        ...

    def find(self, encoding: str, method: str, scheme: Scheme, layout: str, source: Read) -> Encode | None:
        """The callable for a weight of that encoding, method, scheme and layout; None where this kernel has none."""
        ...


KERNELS: Registry[Kernel] = Registry("kernel")


def find_kernel(source: Read, method: Method, scheme: Scheme, layout: Layout) -> Encode | None:
    """The first registered fast path for a weight; none for one that steps change on its way."""
    if source.steps:
        return None
    found = (kernel.find(source.encoding, method.name, scheme, layout.name, source) for kernel in KERNELS.values())
    return next((encode for encode in found if encode), None)


def scratch(method: Method, scheme: Scheme) -> int:
    """The most bytes for each value of a tile, whichever way it goes."""
    return max(method.scratch(scheme), *(kernel.scratch(scheme) for kernel in KERNELS.values()), 0)
