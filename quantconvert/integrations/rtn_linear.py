"""A linear layer of the `rtn` layout (`quantconvert.layouts.simple`), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantconvert.layouts.simple import Simple
from quantconvert.schemes import Scheme


def dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, rows: int | None = None) -> Tensor:
    """`(code - zero_point) * scale`: [O, I] in the scale's dtype, from tensors as `quantconvert.layouts.simple` says.

    weight: 8 bit [O, I], 4 bit [ceil(O/2), I]; scale, zero_point: [O, G] or [1]; rows: O, where it may be odd.
    Codes less zero points are at most 255, which float16 and bfloat16 hold exactly.
    """
    if bits == 4:
        weight = torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1)[:rows]
    groups = scale.shape[1] if scale.dim() == 2 else 1
    scale = scale.view(-1, groups, 1)
    values = weight.view(weight.shape[0], groups, -1).to(scale.dtype)
    if zero_point is not None:
        values = values.sub_(zero_point.view(scale.shape).to(scale.dtype))
    elif bits == 4:
        values = values.sub_(8)
    return values.mul_(scale).view(weight.shape)


def dequantize_all(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor] | None,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """[M, O, I] in `dtype`, as the scales are before they multiply, of M modules of one shape and scheme."""
    result: Tensor | None = None
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        rows = scale.shape[0] if scale.dim() == 2 else None
        dense = dequantize(weight, scale.to(dtype), zero_points[i] if zero_points else None, bits, rows)
        if result is None:
            result = dense.new_empty((len(weights), *dense.shape))
        result[i] = dense
    assert result is not None
    return result


class RtnLinear(nn.Module):
    """`nn.Linear` on codes: weight, weight_scale and weight_zero_point as in the file, bias [O]; see `dequantize`.

    Parameters and not buffers, so that they are counted and offloaded like any weight; none of them can be trained.
    The scale has the dtype that the model is loaded in, hence so have the products.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        """Empty tensors on the device of `linear`, which lends its shape, dtype and bias."""
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, scheme.num_bits
        self.register_parameter("weight_zero_point", None)
        self.register_parameter("bias", linear.bias)
        dtypes = {
            "U8": torch.uint8,
            "I8": torch.int8,
            "F32": linear.weight.dtype,
        }  # the scale's tag is only a place for the dtype
        for spec in Simple().outputs((self.out_features, self.in_features), "F32", scheme):
            empty = torch.empty(spec.shape, dtype=dtypes[spec.dtype], device=linear.weight.device)
            self.register_parameter(spec.suffix, nn.Parameter(empty, requires_grad=False))

    def dequantize(self) -> Tensor:
        """The weight [O, I]."""
        return dequantize(self.weight, self.weight_scale, self.weight_zero_point, self.bits, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}"
