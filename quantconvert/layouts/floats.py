"""Floats as codes beside their scales, as every layout of them has it.

    float8    M.weight         float8_e4m3fn [O, I]
    float4    M.weight_packed  uint8 [O, I/2], the even column in the lower half; a sign, then the place among
                               0, 0.5, 1, 1.5, 2, 3, 4, 6
    M.<scale>                  [O, 1] per channel, [1] per tensor, [O, I/S] by groups of S columns,
                               [ceil(O/a), ceil(I/b)] in blocks of a x b, the last partial; w = code * scale
              as e4m3          float8_e4m3fn, with M.weight_global_scale float32 [1], which divides the scales
              as e8m0          uint8, the exponent and 127

Sources: compressed-tensors `compressors/nvfp4`, `mxfp4`, `mxfp8` and `naive_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantconvert.layouts.base import TensorSpec
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.quantized import Quantized


PACKED, DIVISOR = "weight_packed", "weight_global_scale"
_STORED = {"e4m3": "F8_E4M3", "e8m0": "U8"}


def float_outputs(
    shape: tuple[int, ...], scale_dtype: str, scheme: Scheme, suffix: str = "weight_scale"
) -> tuple[TensorSpec, ...]:
    """Codes, scales under `suffix`, and what divides those."""
    rows, columns = shape
    if scheme.num_bits == 4:
        weight = TensorSpec(PACKED, "U8", (rows, -(-columns // 2)))
    else:
        weight = TensorSpec("weight", scheme.number.storage, (rows, columns))
    if scheme.strategy == "tensor":
        return weight, TensorSpec(suffix, scale_dtype, (1,), 0)
    height = scheme.block[0] if scheme.block else 1
    dtype = _STORED.get(scheme.scales, scale_dtype)
    scales = TensorSpec(suffix, dtype, (-(-rows // height), scheme.num_groups(columns)), height)
    return (weight, scales, TensorSpec(DIVISOR, "F32", (1,), 0)) if scheme.scales == "e4m3" else (weight, scales)


def float_rank_problems(scheme: Scheme, shape: tuple[int, int]) -> list[str]:
    """Why a rank cannot hold its share of `shape` [O, I]: blocks are not split, in neither dimension (vLLM's
    `validate_fp8_block_shape`).
    """
    if scheme.block is None:
        return []
    names = ("out_features", "in_features")
    return [
        f"{size} of its {name} share a scale: expected {name} % {size} == 0, got {length}"
        for name, size, length in zip(names, scheme.block, shape, strict=True)
        if length % size
    ]


def float_row_multiple(scheme: Scheme) -> int:
    """Blocks of rows begin with whole blocks of elements."""
    return scheme.block[0] if scheme.block else 1


def float_encode(quantized: Quantized, scheme: Scheme, suffix: str = "weight_scale") -> dict[str, Tensor]:
    """The tensors of `float_outputs`."""
    import torch

    scale = quantized.scale.reshape(1) if scheme.strategy == "tensor" else quantized.scale
    if scheme.scales == "e8m0":
        scale = (scale.double().log2() + 127).to(torch.uint8)
    codes = {"weight": quantized.codes}
    if scheme.num_bits == 4:
        codes = {PACKED: quantized.codes[:, ::2] | quantized.codes[:, 1::2] << 4}
    divisor = {} if quantized.divisor is None else {DIVISOR: quantized.divisor}
    return codes | {suffix: scale} | divisor


def float_decode(blocks: Mapping[str, Tensor], scheme: Scheme, columns: int, suffix: str = "weight_scale") -> Quantized:
    """The inverse."""
    import torch

    from quantconvert.quantized import Quantized

    scale = blocks[suffix]
    scale = scale.reshape(1, 1) if scheme.strategy == "tensor" else scale
    if scheme.scales == "e8m0":
        scale = torch.exp2(scale.double() - 127).float()
    codes = blocks.get("weight")
    if codes is None:
        packed = blocks[PACKED]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)[:, :columns]
    return Quantized(codes, scale, None, scheme.number, scheme.block, divisor=blocks.get(DIVISOR))
