"""The narrow waist: every method yields `Quantized`, every layout takes it and gives it back.

Shapes: O rows of a block of whole rows, I columns, R rows and G columns of the matrix of scales, S columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantconvert.number import E2M1, E2M1_VALUES, CodeType


@dataclass(frozen=True, slots=True)
class Quantized:
    """A block of rows of one weight, as codes; `dequantize` says what it means.

    codes: [O, I], held as `number` says (`quantconvert.number`). scale: [R, G] in the dtype that is stored: [O, G] per
    channel or group, [1, 1] per tensor, one for each `block` otherwise. offset: like the scale; whole numbers are a
    zero point (`w = (code - offset) * scale`), floats a bias (`w = code * scale + offset`), None the number's midpoint.
    block: rows and columns that share a scale, where R is neither 1 nor O; the last ones may be partial, and a block of
    rows begins with a whole one. order: the column of `scale` of each column [I], where groups are not in order (GPTQ's
    `g_idx`). divisor: [1], float32: what all scales are divided by (NVFP4's global scale); None: nothing.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    number: CodeType
    block: tuple[int, int] | None = None
    order: Tensor | None = None
    divisor: Tensor | None = None

    @property
    def factor(self) -> Tensor:
        """The scales as float32, over what divides them all."""
        return self.scale.float() if self.divisor is None else self.scale.float() / self.divisor

    def zero_points(self) -> Tensor:
        """The zero points, made explicit where there are none: uint8, the shape of the scale."""
        if self.offset is not None:
            return self.offset
        return torch.full(self.scale.shape, self.number.midpoint, dtype=torch.uint8)

    @property
    def has_bias(self) -> bool:
        """Whether the offset is a float that is added, and no zero point."""
        return self.offset is not None and self.offset.dtype.is_floating_point


def dequantize(quantized: Quantized) -> Tensor:
    """float32 [O, I]: `(code - zero_point) * scale`, or `code * scale + bias`; each step rounded once."""
    values = code_values(quantized)
    if quantized.number.kind == "int" and not quantized.has_bias:
        _by_group(quantized, values, Tensor.sub_, quantized.zero_points())
    _by_group(quantized, values, Tensor.mul_, quantized.factor)
    if quantized.has_bias and quantized.offset is not None:
        _by_group(quantized, values, Tensor.add_, quantized.offset)
    return values


def code_values(quantized: Quantized) -> Tensor:
    """The codes as float32 [O, I]: whole ones counted from the lowest, four-bit floats looked up."""
    if quantized.number == E2M1:
        return torch.tensor(E2M1_VALUES)[quantized.codes.long()]
    return quantized.codes.float()


def _by_group(
    quantized: Quantized, values_OI: Tensor, change: Callable[[Tensor, Tensor], object], param_RG: Tensor
) -> None:
    """`change` the values in place by a parameter of their group, as float32."""
    rows, columns = values_OI.shape
    param_RG = param_RG.float()
    if quantized.order is None and quantized.block is None:
        groups = param_RG.shape[1]
        change(values_OI.view(rows, groups, columns // groups), param_RG.unsqueeze(-1))
    else:
        change(values_OI, spread(quantized, param_RG, columns))


def spread(quantized: Quantized, param_RG: Tensor, columns: int) -> Tensor:
    """A parameter of groups for each column, [1, I] or [O, I]."""
    if quantized.block is not None:
        height, width = quantized.block
        row = torch.arange(quantized.codes.shape[0]) // height
        return param_RG[row][:, torch.arange(columns) // width]
    order = quantized.order
    if order is None:
        order = torch.arange(param_RG.shape[1]).repeat_interleave(columns // param_RG.shape[1])
    return param_RG[:, order]


def norms(w_OI: Tensor) -> Tensor:
    """The norm of each row; in float64 where float32 does not hold the squares of a row that is not all zero."""
    norms: Tensor = torch.linalg.vector_norm(w_OI, dim=1)
    fits = (norms > 1e-17) & (norms < 1e19)
    if not bool(fits.all()):
        norms = torch.linalg.vector_norm(w_OI, dim=1, dtype=torch.float64)
    return norms


def squares(values: Tensor) -> float:
    """Their sum of squares, in float64; a float64 tensor is overwritten."""
    return float(values.double().square_().sum())
