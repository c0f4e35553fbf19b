"""Memory for tensors: their bytes, buffers that are used again and again, files for what is larger. Imports torch."""

from __future__ import annotations

import ctypes
import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.dtypes import DTYPES
from quantconvert.errors import OutputError
from quantconvert.machine import read_at, roomy_folder


def torch_dtype(tag: str) -> torch.dtype:
    """The torch dtype of a safetensors tag; every tag that tasks quantize or write has one."""
    name = DTYPES[tag].torch_name
    dtype = getattr(torch, name) if name else None
    assert isinstance(dtype, torch.dtype), tag
    return dtype


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory, writable. The tensor must be contiguous; the view keeps it alive."""
    assert tensor.is_contiguous()
    nbytes = tensor.numel() * tensor.element_size()
    raw = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    raw._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")


class Workspace:
    """One thread's buffers, by purpose; they grow to the largest use. (Fresh memory is eight times slower.)

    folder: where its scratch files lie; None: the machine's own for such files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._buffers: dict[str, Tensor] = {}

    def tensor(self, purpose: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A contiguous tensor whose content is whatever the last use for this purpose left."""
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < nbytes:
            self._buffers.pop(purpose, None)
            buffer = self._buffers[purpose] = torch.empty(nbytes, dtype=torch.uint8)
        return buffer[:nbytes].view(dtype).view(shape)

    def trim(self, limit: int) -> None:
        """Give everything back when a rare large use left more than `limit` bytes behind."""
        if sum(buffer.numel() for buffer in self._buffers.values()) > limit:
            self._buffers.clear()


class Scratch:
    """A file without a name, which is gone when this object is, or the process: for what memory has no room for.

    folder: on the disk that it shall take room of; None: the machine's own for such files. Raises `OutputError`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or roomy_folder()
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 (closed with this object)
        except OSError as error:
            raise self._error("create", error) from error

    def _error(self, what: str, error: OSError) -> OutputError:
        return OutputError(f"cannot {what} a scratch file in `{self.folder}`: {error.strerror}")

    def write(self, data: memoryview, offset: int) -> None:
        """Put `data` at byte `offset`."""
        try:
            while data:
                count = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._error("write", error) from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` on, which must have been written."""
        try:
            while buffer:
                count = read_at(self._file.fileno(), buffer, offset)
                assert count, "what is read of a scratch file has been written"
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise self._error("read", error) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
