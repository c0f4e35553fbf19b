"""What is handed to the C library: its structures, field by field, and the numbers that stand for names."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntFlag

# Dtypes in which C computes and stores, and what it reads besides.
ELEMENTS = {"BF16": 0, "F16": 1, "F32": 2}
STORED = ELEMENTS | {"F8_E4M3": 3, "F8_E5M2": 3}
ALONG = {"columns": 0, "rows": 1, "pairs": 2, "bytes": 3, "nothing": 4}
WAYS = {"rows": 0, "columns": 1, "vector": 2, "1 + vector": 3}
# What becomes of a unit's rows.
QUANTIZED, ROUNDED, MEASURED = range(3)


class Wrong(IntFlag):
    """What can go wrong."""

    NONFINITE = 1
    OVERFLOW = 2
    NO_MEMORY = 4
    UNREAD = 8
    UNWRITTEN = 16
    DOUBTFUL = 32


class StepFields(ctypes.Structure):
    """`Step` of native.h."""

    _fields_ = (("factors", ctypes.c_void_p), ("start", ctypes.c_int64), ("way", ctypes.c_int64))


class MeaningFields(ctypes.Structure):
    """`Meaning` of native.h."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("step", ctypes.c_int64),
    )


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
        ("meaning", ctypes.POINTER(MeaningFields)),
        ("steps", ctypes.POINTER(StepFields)),
        ("num_steps", ctypes.c_int64),
        ("importance", ctypes.c_void_p),
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


class SinkFields(ctypes.Structure):
    """`Sink` of unit.h."""

    _fields_ = (
        ("fd", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("element", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("turned", ctypes.c_int64),
        ("block", ctypes.c_void_p),
        ("slab", ctypes.c_void_p),
        ("sum", ctypes.c_uint64),
    )


class UnitFields(ctypes.Structure):
    """`Unit` of unit.h."""

    _fields_ = (
        ("call", Call),
        ("fd", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("transposed", ctypes.c_int64),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("tile_rows", ctypes.c_int64),
        ("mode", ctypes.c_int64),
        ("raw", ctypes.c_void_p),
        ("strip", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
        ("signal", ctypes.c_void_p),
        ("sinks", SinkFields * 3),
        ("error", ctypes.c_int64),
        ("where", ctypes.c_int64),
    )


class TransferFields(ctypes.Structure):
    """`Transfer` of io.h."""

    _fields_ = (
        ("source", ctypes.c_int64),
        ("target", ctypes.c_int64),
        ("source_offset", ctypes.c_int64),
        ("target_offset", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("buffer", ctypes.c_void_p),
        ("buffer_nbytes", ctypes.c_int64),
        ("error", ctypes.c_int64),
    )


def order_of(places: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """The order of `PackedFields`."""
    return (ctypes.c_int32 * 8)(*places)
