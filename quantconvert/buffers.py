"""Memory for tensors: their bytes, and buffers that are used again and again. Imports torch."""

from __future__ import annotations

import ctypes
from math import prod

import torch
from torch import Tensor

from quantconvert.dtypes import DTYPES


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
