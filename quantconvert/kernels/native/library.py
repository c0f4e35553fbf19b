"""The C library: where it lies, what it offers, its one call. Needs no torch, and releases Python's lock while it runs.

The library is compiled when the package is installed (`hatch_build.py`); without it there is none.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from pathlib import Path

# As in `native.h`; a library of another number is left alone.
ABI = 2
FILE = {"win32": "quantconvert.dll", "darwin": "libquantconvert.dylib"}.get(sys.platform, "libquantconvert.so")
ELEMENTS = {"BF16": 0, "F16": 1, "F32": 2}
ALONG = {"columns": 0, "rows": 1, "pairs": 2, "bytes": 3, "nothing": 4}


class Wrong(IntFlag):
    """What can go wrong."""

    NONFINITE = 1
    OVERFLOW = 2
    NO_MEMORY = 4


class StepFields(ctypes.Structure):
    """`Step` of native.h."""

    _fields_ = (("factors", ctypes.c_void_p), ("start", ctypes.c_int64), ("columns", ctypes.c_int64))


class PackedFields(ctypes.Structure):
    """`Packed` of native.h."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("along", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("order", ctypes.c_int32 * 8),
    )


class Call(ctypes.Structure):
    """`Call` of native.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("steps", ctypes.POINTER(StepFields)),
        ("num_steps", ctypes.c_int64),
        ("span", ctypes.c_void_p),
        ("element", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("num_bits", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("codes", PackedFields),
        ("zeros", PackedFields),
        ("scales", ctypes.c_void_p),
        ("noise", ctypes.c_double),
        ("signal", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True)
class Library:
    """levels: the instruction sets of it that this processor has, the fastest last."""

    functions: ctypes.CDLL
    levels: tuple[str, ...]

    def quantize(self, call: Call, level: int) -> Wrong:
        """Carry out a call; its outputs mean something where nothing went wrong."""
        return Wrong(self.functions.quantconvert_quantize(ctypes.byref(call), level))


def order_of(places: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """The order of `PackedFields`."""
    return (ctypes.c_int32 * 8)(*places)


@cache
def find_library() -> Library | None:
    """The library beside this file; None where there is none that fits this package and processor."""
    path = Path(__file__).with_name(FILE)
    if sys.byteorder != "little" or not path.is_file():
        return None
    try:
        functions = ctypes.CDLL(str(path))
        functions.quantconvert_level.restype = ctypes.c_char_p
        functions.quantconvert_quantize.argtypes = (ctypes.POINTER(Call), ctypes.c_int)
        if functions.quantconvert_abi() != ABI:
            return None
        names = [functions.quantconvert_level(i) for i in range(functions.quantconvert_levels())]
    except (OSError, AttributeError):  # of another system, or another library
        return None
    return Library(functions, tuple(name.decode() for name in names)) if names else None
