"""What is stored of a weight, decoded in C and compared with its source. Needs no torch.

A kernel that finds nothing wrong is right: it never passes what the reference would not. What it doubts is for the
reference to judge.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from math import inf, isfinite
from typing import NamedTuple

from quantconvert.kernels.native.fields import ALONG, ELEMENTS, Call, PackedFields, Wrong, order_of
from quantconvert.kernels.native.library import Library, address_of
from quantconvert.kernels.native.template import Steps
from quantconvert.layouts import LAYOUTS, Layout, Packed, Packing, Stored
from quantconvert.methods import Reach, Tolerance
from quantconvert.schemes import NUM_BITS
from quantconvert.sources import Read
from quantconvert.sources.read import PLAIN
from quantconvert.sources.steps.scale import Scale

# The library and the number of its level.
Kernel = tuple[Library, int]


class StrideFields(ctypes.Structure):
    """`Strides` of check.h."""

    _fields_ = (("row", ctypes.c_int64), ("column", ctypes.c_int64))


class AllowedFields(ctypes.Structure):
    """`Allowed` of check.h."""

    _fields_ = (
        ("inside", ctypes.c_double),
        ("outside", ctypes.c_double),
        ("outside_tiny", ctypes.c_double),
        ("coarse", ctypes.c_double),
        ("fine", ctypes.c_double),
        ("tiny", ctypes.c_double),
        ("negative", ctypes.c_int64),
    )


class CheckFields(ctypes.Structure):
    """`Check` of check.h."""

    _fields_ = (
        ("call", Call),
        ("codes", StrideFields),
        ("zeros", StrideFields),
        ("scales", StrideFields),
        ("allowed", AllowedFields),
        ("whole", ctypes.c_int64),
        ("last", ctypes.c_int64),
        ("steps", ctypes.c_double),
        ("noise", ctypes.c_double),
        ("signal", ctypes.c_double),
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
    )


class StripFields(ctypes.Structure):
    """`Strips` of check.h."""

    _fields_ = (
        ("fd", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_void_p),
    )


class Block(NamedTuple):
    """Where numbers of some rows lie in memory: the first one's address, and how many elements apart (what shares an
    element counts as one) neighbours in a column, and in a row, are.
    """

    address: int
    row: int
    column: int


class Rows(NamedTuple):
    """Rows of the source as they are stored: the first one's address, elements from one to the next."""

    address: int
    stride: int


def takes_rows(read: Read) -> bool:
    """Whether rows of the source are read by C: plain numbers, their steps nothing but factors."""
    plain = read.encoding == PLAIN and not read.view.transposed and {read.dtype, read.values.dtype} <= set(ELEMENTS)
    return plain and all(isinstance(step, Scale) for step in read.steps)


def packing_of(stored: Stored) -> Packing | None:
    """How what is stored lies, where C decodes it as its layout does; None where it does not."""
    layout, scheme, columns = LAYOUTS[stored.layout], stored.scheme, stored.shape[1]
    size = columns if scheme.group_size is None else scheme.group_size
    if scheme.type != "int" or scheme.num_bits not in NUM_BITS or columns < 1 or size < 1 or columns % size:
        return None
    packing = layout.packing(scheme)
    if packing is None or type(layout).dequantize is not Layout.dequantize or stored.reordered:
        return None
    codes, zeros = packing.codes, None if scheme.symmetric else packing.zeros
    if zeros is not None and (zeros.suffix not in stored.refs or stored.zero_offset or zeros.along in _ROWS_ALONE):
        return None
    if codes.suffix not in stored.refs or (codes.along == "bytes" and scheme.num_bits < 8):
        return None
    return Packing(codes, zeros) if stored.scale.dtype in ELEMENTS else None


# What codes may be, and zero points are in no layout.
_ROWS_ALONE = ("columns", "pairs")


class Checker:
    """One weight's check, block by block of its rows in order. origin: its source; None: no more than its parameters
    is looked at. tiny: below twice the smallest number of the dtypes of scales nothing is asked of them.
    """

    def __init__(
        self,
        kernel: Kernel,
        stored: Stored,
        packing: Packing,
        origin: Read | None,
        steps: Steps,
        tolerance: Tolerance,
        tiny: float,
    ) -> None:
        scheme, columns = stored.scheme, stored.shape[1]
        (self.library, self.level), self.packing, self._steps = kernel, packing, steps
        self.scale_suffix = stored.scale_suffix
        self._fields = CheckFields(
            call=Call(
                columns=columns,
                group_size=scheme.group_size or columns,
                steps=steps.fields,
                num_steps=len(steps.fields),
                element=ELEMENTS[origin.values.dtype] if origin else 0,
                scale_dtype=ELEMENTS[stored.scale.dtype],
                num_bits=scheme.num_bits,
                symmetric=scheme.symmetric,
            ),
            allowed=allowed_by(tolerance, tiny),
            whole=scheme.strategy == "tensor",
        )

    def check(self, span: tuple[int, int], last: bool, rows: Rows | None, blocks: Mapping[str, Block]) -> bool:
        """Check rows of a half-open span; False where something is doubtful. last: there are none after them."""
        fields, call = self._fields, self._fields.call
        call.first_row, call.rows, fields.last = span[0], span[1] - span[0], last
        call.weights, call.stride = rows or (None, 0)
        call.codes, fields.codes = _placed(self.packing.codes, blocks)
        call.zeros, fields.zeros = _placed(self.packing.zeros, blocks)
        scales = blocks[self.scale_suffix]
        call.scales, fields.scales = scales.address, StrideFields(scales.row, scales.column)
        return _run(self.library.functions.quantconvert_check(ctypes.byref(fields), self.level))

    @property
    def error(self) -> tuple[float, float, float] | None:
        """The largest distance in steps, the sums of squares of distances and of the source; None where they are not
        finite.
        """
        found = self._fields.steps, self._fields.noise, self._fields.signal
        return found if all(map(isfinite, found)) else None


def is_same(
    kernel: Kernel, origin: Read, steps: Steps, rows: tuple[Rows, Rows], span: tuple[int, int], dtype: str
) -> bool:
    """Whether rows of a tensor in high precision (the second of `rows`) are the source's after their steps, rounded to
    `dtype` once. False where a value is NaN, too.
    """
    (library, level), (theirs, ours) = kernel, rows
    call = Call(
        weights=theirs.address,
        stride=theirs.stride,
        rows=span[1] - span[0],
        columns=origin.matrix[1],
        group_size=origin.matrix[1],
        first_row=span[0],
        steps=steps.fields,
        num_steps=len(steps.fields),
        element=ELEMENTS[origin.values.dtype],
        dtype=ELEMENTS[dtype],
        codes=PackedFields(ours.address, ALONG["bytes"]),
    )
    return _run(library.functions.quantconvert_same(ctypes.byref(call), level))


def gather(kernel: Kernel, fd: int, offset: int, stride: int, shape: tuple[int, int], view: memoryview) -> bool:
    """Fill `view` with parts [count, nbytes] of an open file, from `offset` on and `stride` bytes apart. False where
    that cannot be read.
    """
    (library, level), (count, nbytes) = kernel, shape
    fields = StripFields(fd, offset, stride, nbytes, count, address_of(view))
    return not library.functions.quantconvert_gather(ctypes.byref(fields), level)


def judges(tolerance: Tolerance) -> bool:
    """Whether a tolerance is one that C knows."""
    return tolerance.outside is None or isinstance(tolerance.outside, Reach)


def allowed_by(tolerance: Tolerance, tiny: float) -> AllowedFields:
    """A tolerance as C reads it."""
    outside = tolerance.outside if isinstance(tolerance.outside, Reach) else Reach(inf)
    return AllowedFields(
        inf if tolerance.inside is None else tolerance.inside,
        outside.steps,
        outside.tiny,
        inf if tolerance.coarse is None else tolerance.coarse,
        -inf if tolerance.fine is None else tolerance.fine,
        tiny,
        tolerance.negative,
    )


def _placed(packed: Packed | None, blocks: Mapping[str, Block]) -> tuple[PackedFields, StrideFields]:
    if packed is None:
        return PackedFields(along=ALONG["nothing"]), StrideFields()
    block = blocks.get(packed.suffix, Block(0, 0, 1))  # codes are not read where there is no source
    fields = PackedFields(block.address, ALONG[packed.along], packed.shift, order_of(packed.order))
    return fields, StrideFields(block.row, block.column)


def _run(wrong: int) -> bool:
    if wrong & Wrong.NO_MEMORY:
        raise MemoryError
    return wrong == 0
