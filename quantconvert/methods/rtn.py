"""Round-to-nearest: no data, no search. The arithmetic, and where it comes from, is in `rounding`.

It promises that each code is a nearest one to the clipped value: |clip(w / s + z) - code| <= 1/2. How far a value may
lie outside the codes' range is bounded too, by the rounding of the scale to its dtype and, where there is a zero point,
by that of the zero point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantconvert.methods.base import Inputs, Needs, Noise, Reach, Tolerance
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.methods.rounding import Range
    from quantconvert.quantized import Quantized

# float32 division and addition, in steps: 2^8 * 2^-24 * 2, with room.
ROUNDING = 1e-4
# How much larger a scale may be than its group asks for: 7.5 / 7 where a quantizer spans 14 steps instead of 15.
MAX_COARSE = 1.15
# How much the roundings of range, scale and stored scale may make a scale smaller.
MIN_FINE = 0.98
# Half the distance from 1 to the next number, and the smallest number, of each dtype of scales.
_PRECISION: Mapping[str, tuple[float, float]] = {
    "BF16": (2.0**-8, 2.0**-133),
    "F16": (2.0**-11, 2.0**-24),
    "F32": (2.0**-24, 2.0**-149),
}


class Rtn:
    """Round to nearest."""

    name = "rtn"
    words = "round to nearest (RTN)"
    needs: Needs = "nothing"
    block_rows = 0

    def supports(self, scheme: Scheme) -> str | None:
        """Every scheme."""
        return None

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> Range | Tensor | None:
        """The range of the whole tensor, where one scale serves all of it; of floats the largest value."""
        if scheme.type == "float":
            from quantconvert.methods.floats import largest_of_all

            return largest_of_all(blocks, scheme)
        from quantconvert.methods.rounding import measure_all

        return measure_all(blocks, scheme)

    def held(self, scheme: Scheme, columns: int) -> int:
        """Two numbers at most."""
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
        """Each group's range gives its scale and zero point, each value the nearest code."""
        from quantconvert.methods import floats, rounding

        if scheme.type == "float":
            return floats.quantize(w_OI, scheme, dtype, scale_dtype, span, noise)
        return rounding.quantize(w_OI, scheme, dtype, scale_dtype, span, noise)

    def scratch(self, scheme: Scheme) -> int:
        """Rounded values in float32, codes, and what comparing takes; of floats clamped values, places
        among the codes, and scales spread over them.
        """
        return 21 if scheme.type == "float" else 9

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        """Half a step inside; outside, half a step and what rounding scale and zero point moves the ends of the range.
        Scales near the smallest number are rounded by a part of that.
        """
        return promised(scheme, weight_dtype, scale_dtype)


def promised(scheme: Scheme, weight_dtype: str, scale_dtype: str, ratio: float = 1.0, shift: int = 0) -> Tolerance:
    """What a method promises whose codes lie at most `shift` from the nearest ones, and whose groups span at least
    `ratio` of their range.
    """
    precisions = [_PRECISION.get(dtype, _PRECISION["BF16"]) for dtype in (weight_dtype, scale_dtype)]
    epsilon, tiny = max(p[0] for p in precisions), sum(p[1] for p in precisions)
    levels = float(scheme.number.levels)
    if scheme.type == "float":
        return _promised_floats(scheme, epsilon, tiny)
    moved_levels, zero = (levels / 2, 0.0) if scheme.symmetric else (2 * levels, 1.0)
    clipped = (levels / 2 if scheme.symmetric else levels) * (1 / ratio - 1)

    fine = MIN_FINE * ratio if ratio < 1 else None  # else what lies outside tells it
    moved = moved_levels / ratio
    outside = Reach(0.5 + moved * 2 * epsilon + zero + clipped + shift, moved * tiny)
    return Tolerance(inside=0.5 + ROUNDING + shift, outside=outside, coarse=MAX_COARSE, fine=fine)


def _promised_floats(scheme: Scheme, epsilon: float, tiny: float) -> Tolerance:
    """The same in distances of neighbouring codes; those at the end of the range count for what lies beyond."""
    number = scheme.number
    reach = number.high / number.spacing(number.high)
    if scheme.scales == "e4m3":  # a scale among the smallest of its dtype may be half of what its group asks for
        return Tolerance(0.5 + ROUNDING, Reach(0.5 + reach))
    if scheme.scales == "e8m0":  # up to 1.75 * 4 over 6
        return Tolerance(0.5 + ROUNDING, Reach(0.5 + reach / 6 + ROUNDING))
    return Tolerance(0.5 + ROUNDING, Reach(0.5 + reach * 2 * epsilon, reach * tiny), coarse=MAX_COARSE)
