"""The arithmetic of rounding to float8 and float4, with no data and no search.

Scales follow compressed-tensors `quantization/utils/helpers.py` (`calculate_qparams`, `generate_gparam`) and
`mxfp_utils.py`, operation by operation; `dt` rounds to the weight's own dtype. a: max |w| of what shares a scale.

    in the weight's dtype       s = dt(a / 448)
    e4m3 under a divisor g      g = dt(448 * 6 / A), A the largest of all that share g;   s = e4m3(g * dt(a / 6))
    e8m0 (powers of two)        s = 2^(e - 2) for e2m1, 2^(e - 8) for e4m3; e = floor(log2 a), + 1 from 1.75 * 2^e on
    q = nearest(w / s), or of w / (s / g), half to even, within the numbers' range

Codes divide in float32 by the *stored* scale (compressed-tensors rounds the quotient to the weight's dtype first, which
moves 3 % of the float8 codes of bfloat16 by one). A scale of zero becomes 1 in the weight's dtype (compressed-tensors:
its epsilon), 0.125 as e4m3, 2^-127 as e8m0: the weights are zeros under any of them. One below the stored dtype's
smallest number becomes that number.

Shapes: O rows of the block, I columns, R and G rows and columns of the scales, S columns of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantconvert.methods.base import Noise, NonFinite, ScaleOverflow
from quantconvert.methods.rounding import totals
from quantconvert.number import E2M1, E2M1_VALUES, E4M3, CodeType
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme

# What becomes of a float8 scale that is zero: as compressed-tensors has it.
LEAST_E4M3 = 0.125
# Between neighbouring magnitudes of e2m1; a value in the middle goes to the one whose pattern is even.
_MIDDLES = tuple((a + b) / 2 for a, b in pairwise(E2M1_VALUES[:8]))


def largest(w_OI: Tensor, scheme: Scheme) -> Tensor:
    """max |w| of what shares a scale, float32 [R, G]; [1, 1] per tensor. Raises `NonFinite`."""
    if scheme.block is not None:
        found = _of_blocks(w_OI, scheme.block)
    else:
        found = w_OI.view(w_OI.shape[0], -1, scheme.group_size or w_OI.shape[1]).abs().amax(2)
    if not bool(torch.isfinite(found).all()):
        raise NonFinite
    return found.amax().view(1, 1) if scheme.strategy == "tensor" else found


def largest_of_all(blocks: Iterable[Tensor], scheme: Scheme) -> Tensor | None:
    """The largest of a whole weight, [1, 1], from its blocks (and those of weights beside it), where one scale serves
    all of it or divides its scales; else None, and nothing is read.
    """
    found = None
    for w_OI in blocks if scheme.strategy == "tensor" or scheme.scales == "e4m3" else ():
        mine = largest(w_OI, scheme).amax().view(1, 1)
        found = mine if found is None else torch.maximum(found, mine)
    return found


def _of_blocks(w_OI: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = w_OI.shape
    padded = pad(w_OI, (0, -columns % block[1], 0, -rows % block[0]))
    return padded.view(-1, block[0], padded.shape[1] // block[1], block[1]).abs().amax((1, 3))


def quantize(
    w_OI: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    span: Tensor | None = None,
    noise: Noise | None = None,
) -> Quantized:
    """Codes and scales of a block of whole rows, float32 [O, I], which is overwritten.

    span: what `largest_of_all` found. Raises `NonFinite`, `ScaleOverflow`.
    """
    if scheme.scales == "e4m3":
        assert span is not None
        divisor = divisor_of(span, dtype)
        return nearest(w_OI, scheme, scales_e4m3(largest(w_OI, scheme), divisor, dtype), divisor, noise)
    if scheme.scales == "e8m0":
        return nearest(w_OI, scheme, powers(largest(w_OI, scheme), scheme.number), None, noise)
    top = largest(w_OI, scheme) if span is None else span
    scale = (top / scheme.number.high).to(dtype).float()
    stored = torch.where(scale == 0, 1.0, scale).to(scale_dtype)
    if bool(torch.isinf(stored).any()):
        raise ScaleOverflow
    stored.masked_fill_(stored == 0, torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps)
    return nearest(w_OI, scheme, stored, None, noise)


def divisor_of(largest: Tensor, dtype: torch.dtype, top: float = E4M3.high) -> Tensor:
    """g, float32 [1]: what makes the largest scale `top`; 1 where everything is zero."""
    least = torch.finfo(dtype).tiny
    found = (top * E2M1.high / largest.clamp(min=least)).to(dtype).float().reshape(1)
    return torch.where(torch.isinf(found), 1.0, found)


def scales_e4m3(largest_RG: Tensor, divisor: Tensor, dtype: torch.dtype, top: float = E2M1.high) -> Tensor:
    """float8_e4m3fn [R, G]: those that make the largest value of a group the code `top`."""
    scale = divisor * (largest_RG / top).to(dtype).float()
    stored = scale.clamp_(max=E4M3.high).to(torch.float8_e4m3fn).float()
    return torch.where(stored == 0, LEAST_E4M3, stored).to(torch.float8_e4m3fn)


def powers(largest_RG: Tensor, number: CodeType) -> Tensor:
    """float32 [R, G], powers of two from 2^-127 to 2^127."""
    mantissa, exponent = torch.frexp(largest_RG)  # mantissa from 0.5 to 1
    exponent = exponent - 1 + (mantissa >= 1.75 / 2).to(exponent.dtype) - {4: 2, 8: 8}[number.num_bits]
    return torch.exp2(torch.where(largest_RG == 0, -127, exponent).clamp_(-127, 127).double()).float()


def nearest(
    w_OI: Tensor, scheme: Scheme, scale_RG: Tensor, divisor: Tensor | None, noise: Noise | None = None
) -> Quantized:
    """The nearest code of each value, under scales that are stored as `scale_RG`; the block is overwritten."""
    number = scheme.number
    factor = scale_RG.float() if divisor is None else scale_RG.float() / divisor
    w_OI.div_(over(factor, scheme, w_OI.shape))
    codes, values = rounded(w_OI, number)
    if noise is not None:
        noise.signal += _total(w_OI.square(), factor, scheme)
        noise.noise += _total(w_OI.sub_(values).square_(), factor, scheme)
    return Quantized(codes, scale_RG, None, number, scheme.block, divisor=divisor)


def rounded(t_OI: Tensor, number: CodeType) -> tuple[Tensor, Tensor]:
    """Codes as `number` holds them, and their values as float32."""
    if number == E4M3:
        codes = t_OI.clamp(number.low, number.high).to(torch.float8_e4m3fn)
        return codes, codes.float()
    odd = torch.arange(len(_MIDDLES)) % 2 == 1
    middles = torch.tensor(_MIDDLES)
    middles = torch.where(odd, torch.nextafter(middles, torch.tensor(0.0)), middles)
    index = torch.bucketize(t_OI.abs(), middles, out_int32=True)
    codes = (index + torch.signbit(t_OI).to(torch.int32) * 8).to(torch.uint8)
    return codes, torch.tensor(E2M1_VALUES)[codes.int()]


def over(scale_RG: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """The scales as a factor of each value, [O or 1, I or 1]."""
    if scheme.group_size:
        return scale_RG.repeat_interleave(scheme.group_size, 1)
    if scheme.block is None:
        return scale_RG
    tall = scale_RG.repeat_interleave(scheme.block[0], 0)[: shape[0]]
    return tall.repeat_interleave(scheme.block[1], 1)[:, : shape[1]]


def _total(squares_OI: Tensor, factor_RG: Tensor, scheme: Scheme) -> float:
    """Squares in steps, each times its scale squared, in the order of `totals`."""
    rows, columns = squares_OI.shape
    if scheme.block is None:
        return totals(squares_OI.view(rows, -1, scheme.group_size or columns), factor_RG.expand(rows, -1))
    height, width = scheme.block
    wide = pad(squares_OI, (0, -columns % width))
    return totals(wide.view(rows, -1, width), factor_RG.repeat_interleave(height, 0)[:rows])
