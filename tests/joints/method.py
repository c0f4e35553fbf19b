"""A method that clips: each group's range is four fifths of what it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quantconvert.methods import Inputs, Needs, Noise, Tolerance
from quantconvert.methods.rounding import Range, measure, quantize
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme

PART = 0.8


class Clip:
    name = "toy-clip"
    words = "round to nearest within four fifths of the range"
    needs: Needs = "nothing"
    block_rows = 0

    def supports(self, scheme: Scheme) -> str | None:
        return "one scale a tensor is not clipped" if scheme.strategy == "tensor" else None

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> None:
        return None

    def held(self, scheme: Scheme, columns: int) -> int:
        return 0

    def quantize(
        self,
        w_OI: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        span: Any = None,
        noise: Noise | None = None,
    ) -> Quantized:
        found = measure(w_OI, scheme)
        return quantize(w_OI, scheme, dtype, scale_dtype, Range(found.low * PART, found.high * PART), noise)

    def scratch(self, scheme: Scheme) -> int:
        return 24

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        beyond = scheme.number.levels * (1 / PART - 1)
        return Tolerance(inside=0.51, outside=lambda scale_RG: torch.full_like(scale_RG, 1.5 + beyond), coarse=1.0)


TOY = Clip()
