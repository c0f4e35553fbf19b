"""The narrow waist: every method yields `Quantized`, every format takes it.

Shapes: O out_features, I in_features, G groups of a row (1 per channel; a per-tensor scale is [1, 1]).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantconvert.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Quantized:
    """A block of rows of one weight: `w = (codes - zero_point) * scale`, group by group.

    codes: uint8 [O, I], 0 .. 2^b - 1. scale: [O, G], in the dtype that is stored. zero_point: uint8 [O, G], or None
    when symmetric, which means 2^(b-1). (compressed-tensors' signed codes are these minus 2^(b-1).)
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def zero_points(self, scheme: Scheme) -> Tensor:
        """The zero points, made explicit when symmetric: uint8 [O, G]."""
        if self.zero_point is not None:
            return self.zero_point
        return torch.full(self.scale.shape, 1 << (scheme.num_bits - 1), dtype=torch.uint8)

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Quantized:
        """With a zero point that a layout stores even when it is symmetric."""
        return cls(codes, scale, None if scheme.symmetric else zero_point)
