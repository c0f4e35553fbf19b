"""Weights that are stored as one number an element, times the scale of its block at most: what kernels read themselves.

Needs no torch; the formulas are those of `quantconvert.sources.fp8`.
"""

from __future__ import annotations

import struct
from array import array
from functools import cache
from math import ldexp, nan
from typing import TYPE_CHECKING, NamedTuple

from quantconvert.sources.fp8 import Fp8
from quantconvert.sources.read import PLAIN, Read

if TYPE_CHECKING:
    from quantconvert.sources.rows import Files


class BlockScales(NamedTuple):
    """values: the bytes of float32 [.., width], rows along those of the weight. block: rows and columns of the matrix,
    its rows along those of the weight, that share one.
    """

    values: memoryview
    width: int
    block: tuple[int, int]


def is_elements(read: Read) -> bool:
    """Whether a weight is stored so."""
    return read.encoding in (PLAIN, Fp8.name)


@cache
def table_of(dtype: str) -> memoryview | None:
    """What each byte of a float8 dtype means, the bytes of float32 [256]; None for dtypes of more bytes."""
    decoders = {"F8_E4M3": _e4m3, "F8_E5M2": _e5m2}
    return memoryview(array("f", map(decoders[dtype], range(256)))).cast("B") if dtype in decoders else None


def _e4m3(byte: int) -> float:
    """One sign bit, four of the exponent, three of the fraction; NaN and no Inf (OCP 8-bit Floating Point, 1.0)."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = ldexp(fraction, -9) if exponent == 0 else ldexp(8 + fraction, exponent - 10)
    size = nan if byte & 0x7F == 0x7F else size
    return -size if byte >> 7 else size


def _e5m2(byte: int) -> float:
    """The upper half of a float16."""
    return float(struct.unpack("<e", bytes((0, byte)))[0])


def block_scales(read: Read, files: Files) -> BlockScales | None:
    """The scales of a weight's blocks; None where there are none. Raises `CheckpointError`."""
    if read.encoding == PLAIN:
        return None
    ref, expert = read.refs["scale"], read.view.expert
    count = ref.shape[0] if expert is not None else 1
    nbytes = ref.nbytes // count
    raw = memoryview(bytearray(nbytes))
    files.read_into(ref.file, raw, ref.offset + (expert or 0) * nbytes)
    values = _floats(raw, ref.dtype)
    (rows, columns), width = read.detail, -(-read.values.shape[-1] // read.detail[1])
    if read.view.transposed:
        numbers = values.cast("f")
        turned = array("f", (numbers[i] for first in range(width) for i in range(first, len(numbers), width)))
        return BlockScales(memoryview(turned).cast("B"), len(numbers) // width, (columns, rows))
    return BlockScales(values, width, (rows, columns))


def _floats(raw: memoryview, dtype: str) -> memoryview:
    """Stored scales as the bytes of float32; uint8 and float8_e8m0 are exponents."""
    if dtype == "F32":
        return raw
    if dtype == "BF16":
        words = memoryview(array("I", (bits << 16 for bits in raw.cast("H"))))
        return words.cast("B")
    if dtype == "F16":
        return memoryview(array("f", struct.unpack(f"<{len(raw) // 2}e", raw))).cast("B")
    return memoryview(array("f", (nan if u == 255 else ldexp(1.0, u - 127) for u in raw))).cast("B")
