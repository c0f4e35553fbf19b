"""The rows of float8 weights: formula and source in `quantconvert.sources.fp8`. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.sources.read import Read
from quantconvert.sources.rows import POWERS, Files, Matrix, PlainRows


class Fp8Rows(PlainRows):
    """float8 times the scale of its block."""

    def __init__(self, read: Read, matrix: Matrix, files: Files, work: Workspace) -> None:
        super().__init__(matrix, work)
        self.view = read.view
        self.block = read.detail[::-1] if read.view.transposed else read.detail
        self.scale_AB = self._scale(read, files)

    def _scale(self, read: Read, files: Files) -> Tensor:
        """The matrix of scales, rows along those of the weight; uint8 and float8_e8m0 are exponents."""
        ref, expert = read.refs["scale"], read.view.expert
        count = ref.shape[0] if expert is not None else 1
        raw = torch.empty(ref.num_elements // count, dtype=torch_dtype(ref.dtype))
        files.read_into(ref.file, bytes_of(raw), ref.offset + (expert or 0) * (ref.nbytes // count))
        scale = POWERS[raw.int()] if raw.dtype == torch.uint8 else raw.float()
        height, width = read.values.shape[-2:]
        scale = scale.reshape(-(-height // read.detail[0]), -(-width // read.detail[1]))
        return scale.t().contiguous() if read.view.transposed else scale

    def _scale_of(self, first: int, last: int) -> Tensor:
        rows = (self.view.start + self.view.step * torch.arange(first, last)) // self.block[0]
        return self.scale_AB[rows]

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        w_OI = super().rows(first, last, columns)
        scale_OG, width = self._scale_of(first, last), self.block[1]
        if columns is not None:
            return w_OI.mul_(scale_OG[:, torch.arange(*columns) // width])
        whole = w_OI.shape[1] // width
        if whole:
            w_OI[:, : whole * width].view(-1, whole, width).mul_(scale_OG[:, :whole].unsqueeze(-1))
        if whole < scale_OG.shape[1]:
            w_OI[:, whole * width :].mul_(scale_OG[:, whole:])
        return w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        return {"weight": self.matrix.rows(first, last), "scale": self._scale_of(first, last)}
