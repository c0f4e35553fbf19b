"""float8 codes beside their scales, as every layout of them has it.

M.weight  float8_e4m3fn [O, I]    M.<scale>  [O, 1] per channel, [1] per tensor, [ceil(O/a), ceil(I/b)] in blocks of
                                  a x b, the last of which may be partial; w = code * scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantconvert.layouts.base import TensorSpec
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.quantized import Quantized


def float_outputs(
    shape: tuple[int, ...], scale_dtype: str, scheme: Scheme, suffix: str = "weight_scale"
) -> tuple[TensorSpec, TensorSpec]:
    """Codes, and scales under `suffix`."""
    rows, columns = shape
    weight = TensorSpec("weight", scheme.number.storage, (rows, columns))
    if scheme.strategy == "tensor":
        return weight, TensorSpec(suffix, scale_dtype, (1,), 0)
    height = scheme.block[0] if scheme.block else 1
    return weight, TensorSpec(suffix, scale_dtype, (-(-rows // height), scheme.num_groups(columns)), height)


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
    scale = quantized.scale.reshape(1) if scheme.strategy == "tensor" else quantized.scale
    return {"weight": quantized.codes, suffix: scale}


def float_decode(blocks: Mapping[str, Tensor], scheme: Scheme, suffix: str = "weight_scale") -> Quantized:
    """The inverse."""
    from quantconvert.quantized import Quantized

    scale = blocks[suffix]
    scale = scale.reshape(1, 1) if scheme.strategy == "tensor" else scale
    return Quantized(blocks["weight"], scale, None, scheme.number, scheme.block)
