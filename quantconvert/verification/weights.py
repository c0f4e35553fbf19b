"""How far one weight is from its source, and whether its method allows that. Imports torch.

What is judged is what engines compute: the layout's own dequantizer over the stored bytes. How much it may be off is
the method's to say (`Method.tolerance`). A scale of zero, which others write, makes every weight of its group zero.

Legend: O rows of a block, I columns, R rows and G columns of the scales, S columns of a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantconvert.methods import Tolerance
from quantconvert.methods.rounding import squares
from quantconvert.quantized import Quantized, spread
from quantconvert.schemes import Scheme
from quantconvert.verification.findings import TensorError

# The smallest numbers of the dtypes of scales: what would be less becomes that.
_SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}
# Other tools' weights: they round in other precisions, search and compensate, so that single values tell nothing. A
# weight of which half is noise is no weight: int4 has a tenth.
FOREIGN = Tolerance(relative=0.5, negative=True)


class Errors:
    """Largest and summed errors of one weight, in float64, over its blocks in order.

    steps: the largest error before clipping; inside: the largest after clipping, where that is more than the tolerance
    allows; excess: by how much a clipped value is farther off than it may be; coarse: the largest scale over what the
    range of its values asks for. dtypes: that in which the scale was computed, and that of the stored scale.
    """

    def __init__(self, scheme: Scheme, tolerance: Tolerance, dtypes: tuple[str, str]) -> None:
        self.scheme, self.tolerance, self.dtypes = scheme, tolerance, dtypes
        self.inside = self.steps = self.noise = self.signal = 0.0
        self.excess = -math.inf
        self.coarse = 0.0
        self._low = self._high = 0.0

    def add(self, w_OI: Tensor, decoded_OI: Tensor, quantized: Quantized) -> None:
        """Take in a block: the source's values, the engines' (overwritten), and the codes that they come from."""
        columns = w_OI.shape[1]
        scale_OI = spread(quantized, quantized.scale.float().abs(), columns)
        off_OI = _steps(w_OI, decoded_OI, quantized, scale_OI)
        noise = squares(decoded_OI.sub_(w_OI))
        self.noise += noise if math.isfinite(noise) else squares(off_OI.double() * scale_OI.double())
        self.signal += squares(w_OI)
        off_OI.abs_()
        self.steps = _larger(self.steps, off_OI.max())
        self._judge_values(w_OI, off_OI, quantized, scale_OI)
        if self.tolerance.coarse is not None and quantized.order is None and quantized.block is None:
            self._compare_scales(w_OI, quantized.scale.float())

    def _judge_values(self, w_OI: Tensor, off_OI: Tensor, quantized: Quantized, scale_OI: Tensor) -> None:
        """Values that are farther off than codes inside their range may be: only those beyond the range are excused."""
        allowed = self.tolerance.inside
        if allowed is None:
            return
        far = ~(off_OI <= allowed)  # NaN is far
        if not bool(far.any()):
            return
        outside_OI = _outside(w_OI, quantized, scale_OI)
        self.inside = _larger(self.inside, (off_OI - outside_OI)[far].max())
        if self.tolerance.outside is not None:
            scale_RG = quantized.scale.double().abs()
            bound_OI = spread(quantized, self.tolerance.outside(scale_RG), w_OI.shape[1]).expand_as(off_OI)
            self.excess = _larger(self.excess, (off_OI - bound_OI)[far].max())

    def _compare_scales(self, w_OI: Tensor, scale_OG: Tensor) -> None:
        """A scale must not be larger than the range of its values asks for: codes far from the values would pass."""
        w_OGS = w_OI.view(w_OI.shape[0], scale_OG.shape[1], -1)
        low, high = w_OGS.amin(-1).clamp_(max=0), w_OGS.amax(-1).clamp_(min=0)
        if self.scheme.strategy == "tensor":
            self._low, self._high = min(self._low, float(low.min())), max(self._high, float(high.max()))
            low, high = torch.full((1, 1), self._low), torch.full((1, 1), self._high)
        top = float(self.scheme.number.top)
        wanted = torch.maximum(-low, high) / (top / 2) if self.scheme.symmetric else high / top - low / top
        tiny = 2 * max(_SMALLEST.get(dtype, 0.0) for dtype in self.dtypes)  # below that a scale becomes 1, or is coarse
        ratio = torch.where(wanted > tiny, (scale_OG - tiny) / wanted, 0.0)
        found = float(ratio.max())
        self.coarse = found if self.scheme.strategy == "tensor" else max(self.coarse, found)

    def result(self, name: str) -> TensorError | None:
        """The error for the report; None where it is no number."""
        if not all(map(math.isfinite, (self.steps, self.noise, self.signal))):
            return None
        return TensorError.of(name, self.scheme.label, self.steps, self.noise, self.signal)

    def problem(self, judge_scales: bool) -> str | None:
        """What is wrong, if anything. judge_scales: whether a scale may be compared with what its values ask for
        (those of a source that was quantized before may be another quantizer's).
        """
        allowed, relative = self.tolerance, math.sqrt(self.noise / self.signal) if self.signal else 0.0
        if allowed.inside is not None and not self.inside <= allowed.inside:
            return f"a code is {self.inside:.4f} steps from its value: expected at most {allowed.inside:.4g}"
        if not self.excess <= 0:
            bound = self.steps - self.excess
            return f"a value lies {self.steps:.4f} steps from its code: expected at most {bound:.4f} with clipping"
        if judge_scales and allowed.coarse is not None and self.coarse > allowed.coarse:
            return f"a scale is {self.coarse:.3g} times what the values of its group ask for"
        if allowed.relative is not None and not relative <= allowed.relative:
            return f"its relative error is {relative:.3g}: expected at most {allowed.relative}"
        return None


def _steps(w_OI: Tensor, decoded_OI: Tensor, quantized: Quantized, scale_OI: Tensor) -> Tensor:
    """How many steps each value is from what is stored, with its sign, as a new tensor; infinite where none helps."""
    off_OI = (w_OI - decoded_OI).div_(scale_OI)
    if not bool(torch.isfinite(off_OI).all()):
        if not bool(torch.isfinite(decoded_OI).all()) and not quantized.has_bias:  # a product that float32 lacks
            zero_OI = spread(quantized, quantized.zero_points().float(), w_OI.shape[1])
            wide_OI = (w_OI / scale_OI).add_(zero_OI).sub_(quantized.codes.float())
            off_OI = torch.where(torch.isfinite(decoded_OI), off_OI, wide_OI)
        off_OI.masked_fill_((scale_OI == 0) & (w_OI == 0), 0.0)
    return off_OI


def _outside(w_OI: Tensor, quantized: Quantized, scale_OI: Tensor) -> Tensor:
    """By how many steps each value lies beyond the values of the lowest and the highest code; 0 between them."""
    columns = w_OI.shape[1]
    if quantized.has_bias and quantized.offset is not None:
        at_OI = (w_OI - spread(quantized, quantized.offset.float(), columns)) / scale_OI
    else:
        at_OI = w_OI / scale_OI + spread(quantized, quantized.zero_points().float(), columns)
    if bool((quantized.scale < 0).any()):  # the order of codes is turned round
        negative_OI = spread(quantized, quantized.scale.float(), columns) < 0
        zero = 0.0 if quantized.has_bias else spread(quantized, quantized.zero_points().float(), columns)
        at_OI = torch.where(negative_OI, 2 * zero - at_OI, at_OI)
    return (at_OI - at_OI.clamp(0, quantized.number.top)).abs_()


def _larger(known: float, value: Tensor) -> float:
    """The maximum, NaN if the new value is."""
    new = float(value)
    return new if math.isnan(new) else max(known, new)


def range_problem(quantized: Quantized, tolerance: Tolerance) -> str | None:
    """Why scales, zero points or codes cannot be those of the scheme."""
    top = quantized.number.top
    if not bool(torch.isfinite(quantized.scale).all()):
        return "a scale is NaN or Inf"
    if not tolerance.negative and bool((quantized.scale < 0).any()):
        return "a scale is negative"
    offset = quantized.offset
    if offset is not None and quantized.has_bias and not bool(torch.isfinite(offset).all()):
        return "a bias is NaN or Inf"
    if offset is not None and not quantized.has_bias and bool((offset > top).any()):
        return f"a zero point is larger than {top}"
    if quantized.number.kind == "int" and bool((quantized.codes > top).any()):
        return f"a code is larger than {top}"
    return None
