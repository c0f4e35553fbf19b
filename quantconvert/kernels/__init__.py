"""Fast paths: from rows to encoded blocks, or from file to file, in place of steps, quantize and encode.

`find_direct` and `find_kernel` give the first registered kernel that takes a weight, or nothing: then the calls of
methods and layouts run, which are the reference. A kernel gives the same bytes and the same noise, to the bit; the
equivalence tests run over whatever is registered. QUANTCONVERT_KERNEL chooses: `torch` the reference, `native` or one
of its levels the C library, nothing set the best there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantconvert.errors import UsageError
from quantconvert.kernels.base import Direct, Encode, Fast, Kernel, Place, Taken, Unread, Unwritten, Way, Written
from quantconvert.kernels.native import Native
from quantconvert.kernels.native.choice import VARIABLE, check_choice, chosen
from quantconvert.kernels.native.factors import Equalizer
from quantconvert.kernels.native.transport import Transport
from quantconvert.layouts import Layout
from quantconvert.methods import Method
from quantconvert.registry import Registry
from quantconvert.schemes import Scheme
from quantconvert.sources import Read

if TYPE_CHECKING:
    from quantconvert.sources.rows import Files

__all__ = [
    "KERNELS", "VARIABLE", "Direct", "Encode", "Equalizer", "Fast", "Kernel", "Place", "Taken", "Transport",
    "Unread", "Unwritten", "Way", "Written", "check_choice", "find_direct", "find_equalizer", "find_kernel",
    "find_transport", "kernel_label", "most_workers", "scratch",
]  # fmt: skip

NATIVE_WORKERS, TORCH_WORKERS = 8, 3
KERNELS: Registry[Kernel] = Registry("kernel", Native())


def find_kernel(source: Read, method: Method, scheme: Scheme, layout: Layout, files: Files) -> Fast | None:
    """The first registered fast path for a weight."""
    found = (kernel.find(source, method.name, scheme, layout, files) for kernel in KERNELS.values())
    return next((fast for fast in found if fast), None)


def find_direct(way: Way) -> Kernel | None:
    """The kernel by which a weight goes from file to file; None where the first that takes it takes tiles."""
    taken = ((kernel, kernel.takes(way)) for kernel in KERNELS.values())
    kernel, how = next(((kernel, how) for kernel, how in taken if how != "nothing"), (None, "nothing"))
    return kernel if how == "whole" else None


def find_equalizer() -> Equalizer | None:
    """Factors by the C library, where that is to be used."""
    found = chosen()
    return Equalizer(*found) if found else None


def find_transport() -> Transport | None:
    """Copies and checksums by the C library, where that is to be used."""
    found = chosen()
    return Transport(found[0]) if found else None


def most_workers() -> int:
    """How many workers pay. The page cache is the limit of those that call C; torch's fight for the interpreter's lock:
    on 16 cores 16 took longer than 2.
    """
    try:
        return NATIVE_WORKERS if chosen() else TORCH_WORKERS
    except UsageError:  # which the plan refuses
        return TORCH_WORKERS


def kernel_label() -> str:
    """What quantizes where it can: `native (x86-64-v3)`, or `torch`; raises `UsageError` for a choice of neither."""
    return next((label for label in (kernel.label for kernel in KERNELS.values()) if label), "torch")


def scratch(method: Method, scheme: Scheme) -> int:
    """The most bytes for each value of a tile, whichever way it goes."""
    return max(method.scratch(scheme), *(kernel.scratch(scheme) for kernel in KERNELS.values()), 0)
