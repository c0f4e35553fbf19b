"""The rows of ModelOpt's NVFP4: formula and source in `quantconvert.sources.modelopt`. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.sources.modelopt import GROUP
from quantconvert.sources.mxfp4_rows import PAIRS
from quantconvert.sources.read import Read
from quantconvert.sources.rows import Files, Matrix


class ModelOptRows:
    """Four-bit floats times the scale of 16 of them, times that of all."""

    def __init__(self, read: Read, files: Files, work: Workspace) -> None:
        self.weight = Matrix(read.refs["weight"], read.view, files, work)
        self.scale = Matrix(read.refs["scale"], read.view, files, work)
        ref, second = read.refs["scale_2"], torch.empty(1)
        files.read_into(ref.file, bytes_of(second), ref.offset)
        self.second = second

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        pairs_OP = torch.nn.functional.embedding(self.weight.rows(first, last).int(), PAIRS)
        scale_OG = self.scale.rows(first, last).float() * self.second
        w_OI = pairs_OP.view(last - first, -1, GROUP).mul_(scale_OG.unsqueeze(-1)).view(last - first, -1)
        return w_OI[:, slice(*columns)].contiguous() if columns else w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        return {"weight": self.weight.rows(first, last), "scale": self.scale.rows(first, last), "scale_2": self.second}
