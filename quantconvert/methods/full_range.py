"""Symmetric int4 with all sixteen codes: the scale has the sign that makes a group's largest value the code -8.

    s = dt(m / -8), m the value of the largest magnitude; q = rint(clamp(w / s, -8, 7))

Where plain rounding spans 15 steps for the range [-m, m], this spans 16, so that steps are 6 % finer; a value of the
opposite sign that is nearly as large is clipped by up to one of them. For nothing, where a kernel multiplies by scales
of either sign. Sources: AutoRound `docs/full_range_sym.md`; ggml's Q4_0. Other schemes are rounded to nearest.

Shapes: O rows of the block, I columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantconvert.methods.base import Noise, Reach, Tolerance
from quantconvert.methods.rtn import Rtn, promised
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.quantized import Quantized

# The range that plain rounding gives 15 steps, over the one that 16 of the same size span.
RATIO = 7.5 / 8


def is_signed(scheme: Scheme) -> bool:
    """Whether the method has anything to say of a scheme."""
    return scheme.type == "int" and scheme.num_bits == 4 and scheme.symmetric


class FullRange(Rtn):
    """Round to nearest under scales of either sign."""

    name = "full-range"
    words = "full range: symmetric int4 whose scales have either sign"

    def supports(self, scheme: Scheme) -> str | None:
        """Not with zero points, nor where activations are rounded: those kernels were not read."""
        if scheme.type != "int" or scheme.num_bits != 4:
            return None
        if not scheme.symmetric:
            return "it is for symmetric weights: --symmetric"
        return "kernels for rounded activations may want positive scales" if scheme.activations else None

    def quantize(
        self,
        w_OI: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        span: Any = None,
        noise: Noise | None = None,
    ) -> Quantized:
        """Of two values of the same magnitude the negative one counts, so that the scale is positive."""
        if not is_signed(scheme):
            return super().quantize(w_OI, scheme, dtype, scale_dtype, span, noise)
        import torch

        from quantconvert.methods import rounding

        found = span or rounding.measure(w_OI, scheme)
        positive, _ = rounding.qparams(found, scheme, dtype, scale_dtype)  # refuses what the dtype cannot hold
        largest = torch.where(found.high > -found.low, found.high, found.low)
        scale = (largest / -8).to(dtype).to(scale_dtype)
        scale = torch.where(scale == 0, positive, scale)
        return rounding.nearest(w_OI, scheme, scale, None, noise)

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        """As plain rounding's, but for the sign, and a step more for what is clipped at the other end."""
        if not is_signed(scheme):
            return super().tolerance(scheme, weight_dtype, scale_dtype)
        found = promised(scheme, weight_dtype, scale_dtype, RATIO)
        assert isinstance(found.outside, Reach)
        return replace(found, negative=True, outside=replace(found.outside, steps=found.outside.steps + 0.5))
