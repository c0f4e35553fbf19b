"""The rows of MXFP4 weights: formula and source in `quantconvert.sources.mxfp4`. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantconvert.buffers import Workspace
from quantconvert.number import E2M1_VALUES
from quantconvert.sources.mxfp4 import GROUP
from quantconvert.sources.rows import POWERS, Matrix

# Both values of each byte, the low nibble's first: [256, 2].
PAIRS = torch.tensor([[E2M1_VALUES[byte & 15], E2M1_VALUES[byte >> 4]] for byte in range(256)])


class Mxfp4Rows:
    """Four-bit floats times a power of two for 32 of them."""

    def __init__(self, blocks: Matrix, scales: Matrix, work: Workspace) -> None:
        self.blocks, self.scales, self.work = blocks, scales, work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        pairs_OP = torch.nn.functional.embedding(self.blocks.rows(first, last).int(), PAIRS)
        powers_OG = POWERS[self.scales.rows(first, last).long()]
        w_OI = pairs_OP.view(last - first, -1, GROUP).mul_(powers_OG.unsqueeze(-1)).view(last - first, -1)
        return w_OI[:, slice(*columns)].contiguous() if columns else w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        blocks = self.blocks.rows(first, last).clone()  # both are read into the same buffer
        return {"blocks": blocks, "scales": self.scales.rows(first, last)}
