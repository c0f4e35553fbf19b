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
from quantconvert.number import CodeType
from quantconvert.quantized import Quantized, code_values, spread, squares
from quantconvert.schemes import Scheme
from quantconvert.verification.findings import TensorError
from quantconvert.verification.tolerances import relative_of, tiny


class Errors:
    """Largest and summed errors of one weight, in float64, over its blocks in order.

    steps: the largest error before clipping; inside: the largest after clipping, where that is more than the tolerance
    allows; excess: by how much a clipped value is farther off than it may be; coarse, fine: the largest and the
    smallest scale over what the range of its values asks for. dtypes: that in which the scale was computed, and that
    of the stored scale.
    """

    def __init__(self, scheme: Scheme, tolerance: Tolerance, dtypes: tuple[str, str]) -> None:
        self.scheme, self.tolerance, self.dtypes = scheme, tolerance, dtypes
        self.inside = self.steps = self.noise = self.signal = 0.0
        self.excess = -math.inf
        self.coarse, self.fine = 0.0, math.inf
        self._low = self._high = 0.0

    def add(self, w_OI: Tensor, decoded_OI: Tensor, quantized: Quantized) -> None:
        """Take in a block: the source's values, the engines' (overwritten), and the codes that they come from."""
        self.signal += squares(w_OI)
        judged = (self.tolerance.coarse, self.tolerance.fine) != (None, None)
        if judged and quantized.order is None and quantized.block is None:
            self._compare_scales(w_OI, quantized.factor.abs())
        finite = bool(torch.isfinite(decoded_OI).all())  # else a product that float32 does not hold
        off_OI = decoded_OI.sub_(w_OI) if finite else _wide(w_OI, decoded_OI, quantized)
        self.noise += squares(off_OI)
        self._judge_values(w_OI, off_OI.abs_(), quantized)

    def _judge_values(self, w_OI: Tensor, off_OI: Tensor, quantized: Quantized) -> None:
        """Values that are farther off than codes inside their range may be: only those beyond the range are excused.

        Groups are looked at first, and of those in question the few values that are.
        """
        if quantized.number.kind == "float":
            self._judge_floats(w_OI, off_OI, quantized)
            return
        columns = w_OI.shape[1]
        scale_RG = quantized.factor.abs()
        if quantized.order is None and quantized.block is None:
            off_OGS, scale = off_OI.view(off_OI.shape[0], scale_RG.shape[1], -1), scale_RG.unsqueeze(-1)
            steps = _steps(off_OGS.amax(-1), scale_RG)
        else:
            off_OGS, scale = off_OI, spread(quantized, scale_RG, columns)
            steps = _steps(off_OI, scale)
        worst = float(steps.max())
        self.steps = _larger(self.steps, worst)
        allowed = self.tolerance.inside
        if allowed is None or worst <= allowed:
            return
        far = ~(off_OGS <= allowed * scale).view(off_OI.shape)  # NaN is far
        rows, places = far.nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        at = _At(quantized, rows, places, columns)
        off, scales = off_OI[rows, places], at.of(scale_RG)
        steps = _steps(off, scales)
        self.inside = _larger(self.inside, float((steps - at.outside(w_OI[rows, places])).max()))
        if self.tolerance.outside is not None:
            self.excess = _larger(self.excess, float((steps - at.of(self.tolerance.outside(scale_RG.double()))).max()))

    def _judge_floats(self, w_OI: Tensor, off_OI: Tensor, quantized: Quantized) -> None:
        """The same where a step is the distance of a code to its neighbours, times the scale."""
        number, columns = quantized.number, w_OI.shape[1]
        scale_RG = quantized.factor
        scale_OI = (
            spread(quantized, scale_RG, columns)
            if quantized.block
            else scale_RG.repeat_interleave(columns // scale_RG.shape[1], 1)
        )
        steps_OI = _steps(off_OI, scale_OI * spacings(code_values(quantized), number))
        self.steps = _larger(self.steps, float(steps_OI.max()))
        allowed = self.tolerance.inside
        if allowed is None:
            return
        far = ~(steps_OI <= allowed)  # NaN is far
        if not bool(far.any()):
            return
        beyond_OI = (w_OI.abs() / scale_OI - number.high).clamp_(min=0) / number.spacing(number.high)
        self.inside = _larger(self.inside, float((steps_OI - beyond_OI)[far].max()))
        if self.tolerance.outside is not None:
            allowed_OI = self.tolerance.outside(scale_OI.double())
            self.excess = _larger(self.excess, float((steps_OI - allowed_OI).expand_as(far)[far].max()))

    def _compare_scales(self, w_OI: Tensor, scale_OG: Tensor) -> None:
        """A scale must not be larger than the range of its values asks for: codes far from the values would pass."""
        w_OGS = w_OI.view(w_OI.shape[0], scale_OG.shape[1], -1)
        low, high = w_OGS.amin(-1).clamp_(max=0), w_OGS.amax(-1).clamp_(min=0)
        if self.scheme.strategy == "tensor":
            self._low, self._high = min(self._low, float(low.min())), max(self._high, float(high.max()))
            low, high = torch.full((1, 1), self._low), torch.full((1, 1), self._high)
        number = self.scheme.number
        top = 2 * number.high if number.kind == "float" else float(number.top)
        wanted = torch.maximum(-low, high) / (top / 2) if self.scheme.symmetric else high / top - low / top
        least = tiny(self.dtypes)
        ratio = torch.where(wanted > least, (scale_OG - least) / wanted, 0.0)
        finer = torch.where(wanted > 64 * least, (scale_OG + least) / wanted, torch.inf)
        if self.scheme.strategy == "tensor":  # the last block knows the range of all
            self.coarse, self.fine = 0.0, math.inf
        self.coarse, self.fine = max(self.coarse, float(ratio.max())), min(self.fine, float(finer.min()))

    def result(self, name: str) -> TensorError | None:
        """The error for the report; None where it is no number."""
        if not all(map(math.isfinite, (self.steps, self.noise, self.signal))):
            return None
        return TensorError.of(name, self.scheme.label, self.steps, self.noise, self.signal)

    def problem(self, judge_scales: bool) -> str | None:
        """What is wrong, if anything. judge_scales: whether a scale may be compared with what its values ask for
        (those of a source that was quantized before may be another quantizer's).
        """
        allowed, relative = self.tolerance, relative_of(self.noise, self.signal)
        if allowed.inside is not None and not self.inside <= allowed.inside:
            return f"a code is {self.inside:.4f} steps from its value: expected at most {allowed.inside:.4g}"
        if not self.excess <= 0:
            bound = self.steps - self.excess
            return f"a value lies {self.steps:.4f} steps from its code: expected at most {bound:.4f} with clipping"
        if judge_scales and allowed.coarse is not None and self.coarse > allowed.coarse:
            return f"a scale is {self.coarse:.3g} times what the values of its group ask for"
        if judge_scales and allowed.fine is not None and self.fine < allowed.fine:
            return f"a scale is {self.fine:.3g} times what the values of its group ask for"
        if allowed.relative is not None and not relative <= allowed.relative:
            return f"its relative error is {relative:.3g}: expected at most {allowed.relative}"
        return None


def _steps(off: Tensor, scale: Tensor) -> Tensor:
    """Distances in steps; none where both are zero, infinite where only the scale is."""
    return torch.where(off == 0, 0.0, off / scale)


def spacings(values: Tensor, number: CodeType) -> Tensor:
    """`number.spacing` of each float."""
    assert number.mantissa_bits is not None
    exponents = torch.frexp(values)[1] - 1
    exponents = torch.where(values == 0, number.smallest_exponent, exponents).clamp_(min=number.smallest_exponent)
    return torch.exp2((exponents - number.mantissa_bits).float())


def _wide(w_OI: Tensor, decoded_OI: Tensor, quantized: Quantized) -> Tensor:
    """The distances of values to what is stored where that is beyond float32, in its place in a real number's terms."""
    scale_OI = spread(quantized, quantized.factor, w_OI.shape[1])
    if quantized.has_bias and quantized.offset is not None:
        zero_OI = -spread(quantized, quantized.offset.float(), w_OI.shape[1]) / scale_OI
    else:
        zero_OI = spread(quantized, quantized.zero_points().float(), w_OI.shape[1])
    steps_OI = (w_OI / scale_OI).add_(zero_OI).sub_(code_values(quantized))
    return torch.where(torch.isfinite(decoded_OI), decoded_OI - w_OI, steps_OI * scale_OI)


class _At:
    """Single values of a block, and the parameters of their groups."""

    def __init__(self, quantized: Quantized, rows: Tensor, places: Tensor, columns: int) -> None:
        self.quantized, self.rows = quantized, rows
        height, width = quantized.block or (1, columns // quantized.scale.shape[1])
        self.row = rows // height
        self.group = quantized.order[places] if quantized.order is not None else places // width

    def of(self, param_RG: Tensor) -> Tensor:
        """A parameter of groups, for each value."""
        row = self.row if param_RG.shape[0] > 1 else torch.zeros_like(self.row)
        return param_RG[row, self.group]

    def outside(self, w: Tensor) -> Tensor:
        """By how many steps each value lies beyond the values of the lowest and the highest code; 0 between them."""
        scale, number = self.of(self.quantized.factor), self.quantized.number
        if number.kind == "float":
            at = w / scale
            return (at - at.clamp(number.low, number.high)).abs_()
        offset = self.of(self.quantized.zero_points().float())
        at = (w - offset) / scale if self.quantized.has_bias else w / scale + offset
        return (at - at.clamp(0, number.top)).abs_()


def _larger(known: float, new: float) -> float:
    """The maximum, NaN if the new value is."""
    return new if math.isnan(new) else max(known, new)


def range_problem(quantized: Quantized, tolerance: Tolerance) -> str | None:
    """Why scales, zero points or codes cannot be those of the scheme."""
    top = quantized.number.top
    if not bool(torch.isfinite(quantized.factor).all()):
        return "a scale is NaN or Inf"
    if not tolerance.negative and bool((quantized.factor < 0).any()):
        return "a scale is negative"
    offset = quantized.offset
    if offset is not None and quantized.has_bias and not bool(torch.isfinite(offset).all()):
        return "a bias is NaN or Inf"
    if offset is not None and not quantized.has_bias and bool((offset > top).any()):
        return f"a zero point is larger than {top}"
    if quantized.number.kind == "int" and bool((quantized.codes > top).any()):
        return f"a code is larger than {top}"
    if quantized.codes.dtype == torch.float8_e4m3fn and bool(quantized.codes.float().isnan().any()):
        return "a code is NaN"
    return None
