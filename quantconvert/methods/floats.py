"""The arithmetic of rounding to float8, with no data and no search.

Scales follow compressed-tensors `quantization/utils/helpers.py::calculate_qparams`, operation by operation; `dt` rounds
to the weight's own dtype. Codes divide in float32 by the *stored* scale (compressed-tensors rounds the quotient to the
weight's dtype first, which moves 3 % of the codes of bfloat16 by one).

    s = dt(max |w| / 448)        q = e4m3(clamp(w / s, -448, 448)), half to even

A scale of zero becomes 1, so that its weights are exact zeros (compressed-tensors: the dtype's epsilon); one below the
stored dtype's smallest number becomes that number.

Shapes: O rows of the block, I columns, R and G rows and columns of the scales.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantconvert.methods.base import Noise, NonFinite, ScaleOverflow
from quantconvert.methods.rounding import totals
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme


def largest(w_OI: Tensor, scheme: Scheme) -> Tensor:
    """max |w| of what shares a scale, float32 [R, G]; [1, 1] per tensor. Raises `NonFinite`."""
    found = w_OI.abs().amax(1, keepdim=True) if scheme.block is None else _of_blocks(w_OI, scheme.block)
    if not bool(torch.isfinite(found).all()):
        raise NonFinite
    return found.amax().view(1, 1) if scheme.strategy == "tensor" else found


def largest_of_all(blocks: Iterable[Tensor], scheme: Scheme) -> Tensor | None:
    """The same of a whole weight from its blocks, where one scale serves all of it; else None, and nothing is read."""
    found = None
    for w_OI in blocks if scheme.strategy == "tensor" else ():
        mine = largest(w_OI, scheme)
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

    span: the tensor's largest value [1, 1], where one scale serves all of it. Raises `NonFinite`, `ScaleOverflow`.
    """
    number = scheme.number
    top = largest(w_OI, scheme) if span is None else span
    scale = (top / number.high).to(dtype).float()
    stored = torch.where(scale == 0, 1.0, scale).to(scale_dtype)
    if bool(torch.isinf(stored).any()):
        raise ScaleOverflow
    stored.masked_fill_(stored == 0, torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps)
    scale_OI = over(stored.float(), scheme, w_OI.shape)
    w_OI.div_(scale_OI)
    codes = w_OI.clamp(number.low, number.high).to(torch.float8_e4m3fn)
    if noise is not None:
        noise.signal += _total(w_OI.square(), stored, scheme)
        noise.noise += _total(w_OI.sub_(codes.float()).square_(), stored, scheme)
    return Quantized(codes, stored, None, number, scheme.block)


def over(scale_RG: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """The scales as a factor of each value, [O or 1, I or 1]."""
    if scheme.block is None:
        return scale_RG
    tall = scale_RG.repeat_interleave(scheme.block[0], 0)[: shape[0]]
    return tall.repeat_interleave(scheme.block[1], 1)[:, : shape[1]]


def _total(squares_OI: Tensor, scale_RG: Tensor, scheme: Scheme) -> float:
    """Squares in steps, each times its scale squared, in the order of `totals`."""
    if scheme.block is None:
        return totals(squares_OI.unsqueeze(1), scale_RG.expand(squares_OI.shape[0], 1))
    height, width = scheme.block
    wide = pad(squares_OI, (0, -squares_OI.shape[1] % width))
    tall = scale_RG.repeat_interleave(height, 0)[: squares_OI.shape[0]]
    return totals(wide.view(wide.shape[0], -1, width), tall)
