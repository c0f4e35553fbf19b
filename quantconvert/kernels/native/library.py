"""The C library: where it lies and what it offers. Needs no torch, and releases Python's lock while it runs.

The library is compiled when the package is installed (`hatch_build.py`); without it there is none.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quantconvert.kernels.native.fields import Call, TransferFields, UnitFields, Wrong

# As in `native.h`; a library of another number is left alone.
ABI = 5
FILE = {"win32": "quantconvert.dll", "darwin": "libquantconvert.dylib"}.get(sys.platform, "libquantconvert.so")


@dataclass(frozen=True, slots=True)
class Library:
    """levels: the instruction sets of it that this processor has, the fastest last. The outputs of a call mean
    something where nothing went wrong.
    """

    functions: ctypes.CDLL
    levels: tuple[str, ...]

    def quantize(self, call: Call, level: int) -> Wrong:
        """Rows to codes, in memory."""
        return Wrong(self.functions.quantconvert_quantize(ctypes.byref(call), level))

    def convert(self, unit: UnitFields, level: int) -> Wrong:
        """Rows to codes or plain numbers, from file to file."""
        return Wrong(self.functions.quantconvert_convert(ctypes.byref(unit), level))

    def factors(self, site: ctypes.Structure, level: int) -> Wrong:
        """Factors of a vector from rows of the weights that read it. site: `SiteFields`."""
        return Wrong(self.functions.quantconvert_factors(ctypes.byref(site), level))

    def copy(self, transfer: TransferFields) -> Wrong:
        """Bytes from file to file."""
        return Wrong(self.functions.quantconvert_copy(ctypes.byref(transfer)))

    def xxh64(self, data: memoryview, seed: int) -> int:
        """XXH64 of writable memory."""
        found: int = self.functions.quantconvert_xxh64(address_of(data), len(data), seed)
        return found


def address_of(data: memoryview) -> int:
    """Where writable memory begins; it must stay alive and of its size."""
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) if data else 0


@cache
def find_library() -> Library | None:
    """The library beside this file; None where there is none that fits this package and processor."""
    path = Path(__file__).with_name(FILE)
    return open_library(path) if sys.byteorder == "little" and path.is_file() else None


def open_library(path: Path) -> Library | None:
    """The library at `path`, if it is one of ours."""
    try:
        functions = ctypes.CDLL(str(path))
        functions.quantconvert_level.restype = ctypes.c_char_p
        functions.quantconvert_quantize.argtypes = (ctypes.POINTER(Call), ctypes.c_int)
        functions.quantconvert_convert.argtypes = (ctypes.POINTER(UnitFields), ctypes.c_int)
        functions.quantconvert_factors.argtypes = (ctypes.c_void_p, ctypes.c_int)
        functions.quantconvert_copy.argtypes = (ctypes.POINTER(TransferFields),)
        functions.quantconvert_xxh64.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64)
        functions.quantconvert_xxh64.restype = ctypes.c_uint64
        if functions.quantconvert_abi() != ABI:
            return None
        names = [functions.quantconvert_level(i) for i in range(functions.quantconvert_levels())]
    except (OSError, AttributeError):  # of another system, or another library
        return None
    return Library(functions, tuple(name.decode() for name in names)) if names else None
