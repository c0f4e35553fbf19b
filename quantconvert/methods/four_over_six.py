"""NVFP4 with a choice: a group's largest value becomes the code 6, or 4 where that loses less (arXiv 2512.02010).

Codes 4 and 6 are far apart, so that values just below the largest are rounded badly; 4 leaves them finer steps. The
divisor is a power of two that makes the largest scale more than 128 and at most 256, instead of 448: a scale half as
large again is a float8 too, and what was MXFP4 loses nothing, as one of the two scales is then its own, halved or not
(NVIDIA Model-Optimizer #1372), where the exponents of what engines load as one span less than 2^16. Other schemes are
rounded to nearest.

Shapes: O rows of the block, I columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantconvert.methods.base import Noise
from quantconvert.methods.rtn import Rtn
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.quantized import Quantized

LARGEST_SCALE, OTHER_TOP = 256.0, 4.0


class FourOverSix(Rtn):
    """Of two scales the one with the smaller squared error, for each group of NVFP4."""

    name = "four-over-six"
    words = "four over six: of two scales the better one for each group of NVFP4"

    def quantize(
        self,
        w_OI: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        span: Any = None,
        noise: Noise | None = None,
    ) -> Quantized:
        """Both are tried; where they lose the same, 6 it is."""
        if scheme.scales != "e4m3":
            return super().quantize(w_OI, scheme, dtype, scale_dtype, span, noise)
        import torch

        from quantconvert.methods.floats import divisor_of, largest, nearest, over, rounded, scales_e4m3

        divisor, largest_OG = divisor_of(span, dtype, LARGEST_SCALE), largest(w_OI, scheme)
        divisor = torch.exp2((torch.frexp(divisor)[1] - 1).float())
        scales, lost = [], []
        for top in (scheme.number.high, OTHER_TOP):
            scale = scales_e4m3(largest_OG, divisor, dtype, top)
            factor_OI = over(scale.float() / divisor, scheme, w_OI.shape)
            off_OI = rounded(w_OI / factor_OI, scheme.number)[1].mul_(factor_OI).sub_(w_OI)
            lost.append(off_OI.square_().view(w_OI.shape[0], largest_OG.shape[1], -1).sum(-1))
            scales.append(scale.float())
        scale = torch.where(lost[1] < lost[0], scales[1], scales[0]).to(torch.float8_e4m3fn)
        return nearest(w_OI, scheme, scale, divisor, noise)

    def scratch(self, scheme: Scheme) -> int:
        """Beside what rounding takes, the values and factors of a candidate."""
        return super().scratch(scheme) + (12 if scheme.scales == "e4m3" else 0)
