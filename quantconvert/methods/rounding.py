"""The arithmetic of round-to-nearest, with no data and no search.

Scales and zero points follow compressed-tensors `quantization/utils/helpers.py::calculate_qparams` operation by
operation: each result is rounded to the weight's own dtype (`dt` below). Codes divide in float32 by the *stored*
scale, without that intermediate rounding (compressed-tensors' Triton path).

    mn = min(min w, 0), mx = max(max w, 0)                     R = 2^b - 1, q in [-2^(b-1), 2^(b-1) - 1]
    symmetric:  s = dt(max(-mn, mx) / (R / 2))                 zp = 0
    asymmetric: s = dt(dt(mx - mn) / R)                        zp = rint(clamp(dt(qmin - dt(mn / s))))
    q = rint(clamp(w / s + zp))

Three departures, where that arithmetic gives no usable number: a scale of zero (an all-zero or vanishing group)
becomes 1, so that its weights are exact zeros in every layout; a range that overflows `dt` is divided before it is
subtracted; a scale below the stored dtype's smallest number becomes that number.

Sums of squares (`Noise`) are made in steps of the stored scale, t = w / s and e = t + zp - q, in one order (`totals`),
so that they are the same on every machine and whichever kernel makes them.

Shapes: O rows of the block, I columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantconvert.methods.base import Noise, NonFinite, ScaleOverflow
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme

# Adding 1.5 * 2^23 leaves float32 no bits for a fraction: the sum is rounded half to even, which is `rint`, and its low
# mantissa bits are the integer. Twice as fast as `round_` and a cast.
ROUND = float(3 << 22)
# Squares are added in this many lanes, over this many values at a time; then pairs of those sums.
LANES, CHUNK = 16, 128


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of each group, zero included: float32 [O, G]."""

    low: Tensor
    high: Tensor

    def joined(self, other: Range) -> Range:
        """The range of both together, as [1, 1]: for per-tensor scales, found block by block."""
        low, high = torch.minimum(self.low.min(), other.low.min()), torch.maximum(self.high.max(), other.high.max())
        return Range(low.view(1, 1), high.view(1, 1))


def measure(w_OI: Tensor, scheme: Scheme) -> Range:
    """The range of each group of float32 [O, I]; raises `NonFinite`."""
    group = scheme.group_size or w_OI.shape[1]
    w_OGS = w_OI.view(w_OI.shape[0], -1, group)
    low, high = w_OGS.amin(-1).clamp_(max=0), w_OGS.amax(-1).clamp_(min=0)
    if not bool(torch.isfinite(high - low).all()) and not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise NonFinite
    found = Range(low, high)
    return found.joined(found) if scheme.strategy == "tensor" else found


def measure_all(blocks: Iterable[Tensor], scheme: Scheme) -> Range | None:
    """The range of a whole tensor from its blocks, for the one scale that it shares; None where each group has its own.

    Nothing of `blocks` is read in that case. Raises `NonFinite`.
    """
    span: Range | None = None
    for w_OI in blocks if scheme.strategy == "tensor" else ():
        found = measure(w_OI, scheme)
        span = span.joined(found) if span else found
    return span


def qparams(span: Range, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Stored scale [O, G] and signed zero point (float32 [O, G]; None when symmetric) for a measured range."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).float()

    number = scheme.number
    steps = float(number.top)
    if scheme.symmetric:
        scale = rounded(torch.maximum(-span.low, span.high) / (steps / 2))
    else:
        width = rounded(span.high - span.low)
        scale = rounded(width / steps)
        if bool(torch.isinf(width).any()):
            scale = torch.where(torch.isinf(width), rounded(span.high / steps - span.low / steps), scale)
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = None
    if not scheme.symmetric:
        qmin = -number.midpoint
        zero_point = rounded(qmin - rounded(span.low / scale)).clamp_(qmin, qmin + number.top).round_()
        zero_point.masked_fill_(span.high == span.low, 0.0)
    stored = scale.to(scale_dtype)
    if bool(torch.isinf(stored).any()):
        raise ScaleOverflow
    smallest = torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps
    return stored.masked_fill_(stored == 0, smallest), zero_point


def quantize(
    w_OI: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    span: Range | None = None,
    noise: Noise | None = None,
) -> Quantized:
    """Codes, scales and zero points of a block of whole rows.

    w_OI: float32 [O, I], exactly the stored weights; overwritten. dtype: the weight's own dtype. span: the tensor's
    range for per-tensor scales, else measured here. noise: takes in the block's error. Raises `NonFinite` and
    `ScaleOverflow`.
    """
    scale, zero_point = qparams(span or measure(w_OI, scheme), scheme, dtype, scale_dtype)
    return nearest(w_OI, scheme, scale, zero_point, noise)


def nearest(
    w_OI: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None, noise: Noise | None = None
) -> Quantized:
    """The nearest code of each value of float32 [O, I], which is overwritten; parameters as `qparams` gives them."""
    half, top = scheme.number.midpoint, scheme.number.top
    w_OGS = w_OI.view(w_OI.shape[0], -1, scheme.group_size or w_OI.shape[1])
    w_OGS.div_(scale.float().unsqueeze(-1))
    rounded = w_OI if noise is None else noise.scratch(tuple(w_OI.shape))
    if noise is not None:
        torch.mul(w_OI, w_OI, out=rounded)
        noise.signal += totals(rounded.view(w_OGS.shape), scale)
    if zero_point is not None:
        w_OGS.add_(zero_point.unsqueeze(-1))
    torch.clamp(w_OI, -half, top - half, out=rounded).add_(ROUND + half)
    codes = rounded.view(torch.int32).to(torch.uint8)
    if noise is not None:
        w_OI.sub_(rounded.sub_(ROUND + half))
        noise.noise += totals(w_OGS.mul_(w_OGS), scale)
    offset = None if zero_point is None else (zero_point + half).to(torch.uint8)
    return Quantized(codes, scale, offset, scheme.number)


def totals(squares_OGS: Tensor, scale: Tensor) -> float:
    """The sum of float32 squares, each group's times its scale squared; overwrites them.

    The order: in each group, `CHUNK` values at a time are added in `LANES` lanes, one after the other, in float32; the
    lanes of all chunks, times the scale squared, in float64, by pairs of neighbours; at last the lanes, likewise.
    Missing values are zeros.
    """
    size = squares_OGS.shape[-1]
    missing = -size % (LANES if size <= CHUNK else CHUNK)
    padded = pad(squares_OGS, (0, missing)) if missing else squares_OGS
    slices = padded.view(*padded.shape[:2], -1, min(CHUNK, padded.shape[-1]) // LANES, LANES)
    sums = slices[..., 0, :]
    for i in range(1, slices.shape[-2]):
        sums = torch.add(sums, slices[..., i, :], out=None if i == 1 else sums)
    terms = sums.double().mul_(scale.double().square_()[..., None, None])
    return float(_paired(_paired(terms.reshape(-1, LANES))[:, None]))


def _paired(values: Tensor) -> Tensor:
    """The sum over the first axis: each two neighbours are added until one is left."""
    while values.shape[0] > 1:
        even = pad(values, (0, 0, 0, 1)) if values.shape[0] % 2 else values
        values = even[0::2] + even[1::2]
    return values[0]
