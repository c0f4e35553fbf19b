"""Bytes in and out: positioned reads and writes into buffers that are used again and again."""

from __future__ import annotations

import ctypes
import os
import threading
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.dtypes import DTYPES
from quantconvert.errors import CheckpointError


def torch_dtype(tag: str) -> torch.dtype:
    """The torch dtype of a safetensors tag; every tag that tasks quantize or write has one."""
    name = DTYPES[tag].torch_name
    dtype = getattr(torch, name) if name else None
    assert isinstance(dtype, torch.dtype), tag
    return dtype


class Files:
    """Read-only descriptors of the source's files, opened once and shared by all threads (reads are positioned)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"cannot open `{file}` of the source: {error.strerror}") from error
            return self._fds[file]

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on; raises `CheckpointError` when the file ends before."""
        fd, done = self.fd(file), 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read `{file}` at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"`{file}` became shorter while it was read: expected {len(buffer)} bytes at {offset}, got {done}"
                )
            done += count

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory, writable. The tensor must be contiguous; the view keeps it alive."""
    assert tensor.is_contiguous()
    nbytes = tensor.numel() * tensor.element_size()
    raw = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    raw._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")


class Workspace:
    """One thread's buffers, by purpose; they grow to the largest use. (Fresh memory is eight times slower.)"""

    def __init__(self) -> None:
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
