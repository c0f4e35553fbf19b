"""Stored bytes in memory, as `kernels/native/check.py` takes them: rows of a source, blocks of a result's tensors."""

from __future__ import annotations

from quantconvert.checkpoint import TensorRef
from quantconvert.checkpoint.ranges import Files
from quantconvert.kernels.native.check import Block, Kernel, Rows, gather
from quantconvert.kernels.native.library import address_of
from quantconvert.layouts import TensorSpec
from quantconvert.sources import Read


class Buffer:
    """Memory that is used again and again; it grows to the largest use."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._view = memoryview(self._bytes)

    @property
    def address(self) -> int:
        return address_of(self._view)

    def room(self, nbytes: int) -> memoryview:
        """So many bytes of it, whatever the last use left in them."""
        if len(self._bytes) < nbytes:
            self._bytes = bytearray(nbytes)
            self._view = memoryview(self._bytes)
        return self._view[:nbytes]

    def read(self, files: Files, file: str, offset: int, nbytes: int) -> None:
        """Take in bytes of a file."""
        files.read_into(file, self.room(nbytes), offset)

    def holds(self, nbytes: int, other: Buffer) -> bool:
        """Whether so many first bytes are those of another. (Views are compared item by item, arrays are not.)"""
        if len(self._bytes) == len(other._bytes) == nbytes:
            return self._bytes == other._bytes
        return bytearray(self._view[:nbytes]) == other._view[:nbytes]


class Strip:
    """Rows of a plain tensor that is not stored transposed, as they are."""

    def __init__(self, read: Read, files: Files, buffer: Buffer) -> None:
        ref, view = read.values, read.view
        inner = ref.shape[1:] if view.expert is not None else ref.shape
        height = inner[0] if len(inner) > 1 else 1
        self.ref, self.view, self.files, self.buffer = ref, view, files, buffer
        self.width = ref.num_elements // max(1, height * (ref.shape[0] if view.expert is not None else 1))
        self.row_nbytes = self.width * ref.nbytes // max(1, ref.num_elements)
        self.offset = ref.offset + (view.expert or 0) * height * self.row_nbytes

    def rows(self, begin: int, end: int) -> Rows:
        """A half-open span of the view's rows; the next call overwrites them."""
        view = self.view
        first, count = view.start + begin * view.step, (end - begin - 1) * view.step + 1
        self.buffer.read(self.files, self.ref.file, self.offset + first * self.row_nbytes, count * self.row_nbytes)
        return Rows(self.buffer.address, self.width * view.step)


class Part:
    """One tensor of a quantized module. What is stored turned is held, as many rows as `held_nbytes` has room for."""

    def __init__(
        self, ref: TensorRef, spec: TensorSpec, files: Files, buffer: Buffer, held_nbytes: int, kernel: Kernel
    ) -> None:
        self.ref, self.spec, self.files, self.buffer, self.held_nbytes = ref, spec, files, buffer, held_nbytes
        self.kernel, self.suffix = kernel, spec.suffix
        self.element = ref.nbytes // max(1, ref.num_elements)
        self._held = (0, 0)

    def fits(self, rows: int) -> bool:
        """Whether it holds exactly what so many rows make of it."""
        per, axis = self.spec.rows_per_element, self.ref.shape[-1 if self.spec.transposed else 0]
        return per == 0 or -(-rows // per) == axis

    def block(self, begin: int, end: int) -> Block:
        """What is stored of a half-open span of rows; the next call may overwrite it."""
        per, shape = self.spec.rows_per_element, self.ref.shape
        if per == 0:
            self._read(0, self.ref.nbytes)
            return Block(self.buffer.address, 0, 0)
        first, last = begin // per, -(-end // per)
        if not self.spec.transposed:
            row = self.ref.nbytes // shape[0]
            self._read(first * row, (last - first) * row)
            return Block(self.buffer.address, row // self.element, 1)
        if not self._held[0] <= first <= last <= self._held[1]:
            self._hold(first, last)
        left, right = self._held
        return Block(self.buffer.address + (first - left) * self.element, 1, right - left)

    def _read(self, offset: int, nbytes: int) -> None:
        self.buffer.read(self.files, self.ref.file, self.ref.offset + offset, nbytes)

    def _hold(self, first: int, last: int) -> None:
        """Elements first .. last of each stored row, and as many after them as there is room for."""
        height, width = self.ref.shape
        stop = min(width, max(last, first + self.held_nbytes // (height * self.element)))
        row, part = width * self.element, (stop - first) * self.element
        if part == row:
            self._read(0, self.ref.nbytes)
        else:
            self._gather(self.ref.offset + first * self.element, row, (height, part))
        self._held = (first, stop)

    def _gather(self, offset: int, stride: int, shape: tuple[int, int]) -> None:
        """Read a part of each stored row, at once where the file is on this machine."""
        (count, nbytes), fd = shape, self.files.fd(self.ref.file)
        view = self.buffer.room(count * nbytes)
        if fd is not None and gather(self.kernel, fd, offset, stride, shape, view):
            return
        for i in range(count):
            self.files.read_into(self.ref.file, view[i * nbytes : (i + 1) * nbytes], offset + i * stride)
