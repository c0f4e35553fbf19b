"""GPTQ's rounding: each column's error is made up for by the columns after it, as the inputs' second moments say.

    H = moments / mean(diag) + DAMPING I,  H^-1 = U^T U  (U upper triangular)
    for each column j, in order:  q_j = nearest code of w_j;  e = (w_j - decoded q_j) / U_jj;  w_k -= e U_jk for k > j

Source: GPTQ, arXiv 2210.17323, algorithm 1 (lazy updates of blocks of `WIDTH` columns; 1 % damping). Scales and zero
points are found before, on the weights as they are (static groups). Two departures: a code stays within `MAX_SHIFT` of
the nearest one to the weight itself, so that verification has a bound; and a column whose input is always zero is
rounded to nearest, where the paper's code makes it zero.

The result for a row depends neither on the block that it is in nor on threads. What one block of columns does to those
after it is a product of matrices, and libraries sum in orders of their own; so both factors are rounded to `_DIGITS`
binary digits below the largest of their row or column: then every sum of `WIDTH` products is exact in float64.

Imports torch.

Shapes: O rows, I columns, G groups of a row, S columns of a group, B columns of a block, N columns after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantconvert.methods.base import BadInputs, Noise
from quantconvert.methods.gptq import MAX_SHIFT
from quantconvert.methods.rounding import nearest
from quantconvert.methods.searching import best_qparams, check_importance
from quantconvert.quantized import Quantized, norms, squares
from quantconvert.schemes import Scheme

DAMPING = 0.01
WIDTH = 128
# 2 * 22 digits and the 7 of a sum of 128 fit the 53 of float64.
_DIGITS = 22
# Columns of the Cholesky factor that are found together, and columns that are changed together.
_PANEL, _SPREAD = 512, 512
# Rows with values as large are rounded to nearest: what is passed on could leave float32.
_LARGEST = 2.0**100


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """What all rows share: U as float64 [I, I] (zero below the diagonal), and the importances, float32 [I]."""

    factor_II: Tensor
    importance_I: Tensor


def find_feedback(moments_II: Tensor) -> Feedback:
    """From float32 [I, I]; raises `BadInputs` for what is no matrix of second moments."""
    if moments_II.dim() != 2 or moments_II.shape[0] != moments_II.shape[1]:
        raise BadInputs(f"moments of shape {list(moments_II.shape)} are no square matrix")
    importance_I = check_importance(moments_II.diagonal())
    factor_II = moments_II.double()
    diagonal = factor_II.diagonal()
    mean = float(diagonal.mean())
    factor_II.div_(mean if mean > 0 else 1.0)
    diagonal.add_(DAMPING)
    _factorize(factor_II)
    _invert(factor_II)
    for first in range(0, factor_II.shape[0], WIDTH):
        if not bool(torch.isfinite(factor_II[first : first + WIDTH]).all()):
            raise BadInputs("a moment is NaN or Inf")
        _round_digits(factor_II[first : first + WIDTH, first + WIDTH :], 0)
    return Feedback(factor_II, importance_I)


def _panels(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + _PANEL, count)) for first in range(0, count, _PANEL)]


def _factorize(h_II: Tensor) -> None:
    """H = R R^T with R upper triangular, in place; what is below the diagonal is zero then."""
    count = h_II.shape[0]
    for first, last in reversed(_panels(count)):
        panel, rest = h_II[:last, first:last], h_II[first:last, last:]
        if last < count:
            panel.addmm_(h_II[:last, last:], rest.t(), alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(panel[first:].flip(0, 1))
        if bool(failed):
            raise BadInputs("moments are not positive semidefinite")
        panel[first:] = corner = corner.flip(0, 1)
        if first:
            panel[:first] = torch.linalg.solve_triangular(corner.t(), panel[:first], upper=False, left=False)
        h_II[last:, first:last] = 0


def _invert(r_II: Tensor) -> None:
    """The inverse of an upper triangular matrix, in place."""
    count = r_II.shape[0]
    for first, last in reversed(_panels(count)):
        corner = r_II[first:last, first:last]
        corner.copy_(torch.linalg.solve_triangular(corner, torch.eye(last - first, dtype=r_II.dtype), upper=True))
        if last < count:
            rest = r_II[first:last, last:]
            rest.copy_(corner.neg() @ (rest @ r_II[last:, last:]))


def _round_digits(values: Tensor, dim: int) -> None:
    """Round float64 in place to `_DIGITS` binary digits, counted from the largest along `dim`: adding 1.5 * 2^k leaves
    no bits for more.
    """
    if values.numel():
        _, exponent = torch.frexp(values.abs().amax(dim, keepdim=True))
        anchor = torch.ldexp(torch.full_like(exponent, 1.5, dtype=torch.float64), exponent + (52 - _DIGITS))
        values.add_(anchor).sub_(anchor)


def quantize(
    w_OI: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    feedback: Feedback,
    noise: Noise | None = None,
) -> Quantized:
    """Codes, scales and zero points of a block of whole rows, float32 [O, I], which is overwritten; raises as
    `best_qparams` does.
    """
    scale_OG, zero_OG = best_qparams(w_OI, scheme, dtype, scale_dtype, feedback.importance_I)
    if noise is not None:
        noise.signal += squares(norms(w_OI))
    rows = _Rows(w_OI, scheme, scale_OG, zero_OG)
    codes_IO = torch.empty(w_OI.shape[1], w_OI.shape[0], dtype=torch.uint8)
    for first in range(0, w_OI.shape[1], WIDTH):
        errors_BO = rows.round(first, feedback.factor_II, codes_IO)
        rows.pass_on(first, feedback.factor_II, errors_BO)
    half = scheme.number.midpoint
    offset = None if zero_OG is None else (zero_OG + half).to(torch.uint8)
    quantized = Quantized(codes_IO.t().contiguous(), scale_OG, offset, scheme.number)
    loud_O = w_OI.abs().amax(1) >= _LARGEST
    if bool(loud_O.any()):
        zero = None if zero_OG is None else zero_OG[loud_O]
        quantized.codes[loud_O] = nearest(w_OI[loud_O], scheme, scale_OG[loud_O], zero).codes
    if noise is not None:
        noise.noise += _add_noise(w_OI, quantized, noise)
    return quantized


class _Rows:
    """The rows of a block, on their way: columns first, so that a column is contiguous."""

    def __init__(self, w_OI: Tensor, scheme: Scheme, scale_OG: Tensor, zero_OG: Tensor | None) -> None:
        self.w_OI, self.w_IO = w_OI, w_OI.t().clone(memory_format=torch.contiguous_format)
        self.low, self.high = float(-scheme.number.midpoint), float(scheme.number.top - scheme.number.midpoint)
        self.group_size = scheme.group_size or w_OI.shape[1]
        self.scale_GO = scale_OG.float().t().contiguous()
        self.zero_GO = torch.zeros_like(self.scale_GO) if zero_OG is None else zero_OG.t().contiguous()

    def round(self, first: int, factor_II: Tensor, codes_IO: Tensor) -> Tensor:
        """Round the columns of the block from `first`, one after the other; their errors over U_jj, float64 [B, O]."""
        last = min(first + WIDTH, self.w_IO.shape[0])
        w_BO, factor_BB = self.w_IO[first:last], factor_II[first:last, first:last].float()
        diagonal, group_B = factor_BB.diagonal().tolist(), [j // self.group_size for j in range(first, last)]
        low_BO, high_BO = self._bounds(first, last, group_B)
        errors_BO, code_BO, passed_BO = (torch.empty_like(w_BO) for _ in range(3))
        for j, group in enumerate(group_B):
            scale_O, zero_O, code_O, error_O = self.scale_GO[group], self.zero_GO[group], code_BO[j], errors_BO[j]
            torch.div(w_BO[j], scale_O, out=code_O).add_(zero_O).round_()
            torch.clamp(code_O, low_BO[j], high_BO[j], out=code_O)
            torch.sub(code_O, zero_O, out=error_O).mul_(scale_O)
            torch.sub(w_BO[j], error_O, out=error_O).div_(diagonal[j])
            passed = torch.mul(factor_BB[j, j + 1 :, None], error_O, out=passed_BO[j + 1 :])
            w_BO[j + 1 :].sub_(passed)
        codes_IO[first:last] = code_BO.sub_(self.low)
        return errors_BO.double()

    def _bounds(self, first: int, last: int, group_B: list[int]) -> tuple[Tensor, Tensor]:
        """The lowest and highest codes allowed: `MAX_SHIFT` from the nearest one to the weight itself, [B, O] each."""
        group = torch.tensor(group_B)
        nearest_BO = (self.w_OI[:, first:last].t() / self.scale_GO[group]).add_(self.zero_GO[group])
        nearest_BO.round_().clamp_(self.low, self.high)
        return (nearest_BO - MAX_SHIFT).clamp_(min=self.low), nearest_BO.add_(MAX_SHIFT).clamp_(max=self.high)

    def pass_on(self, first: int, factor_II: Tensor, errors_BO: Tensor) -> None:
        """Subtract what the columns of a block leave to those after it."""
        begin, count = first + errors_BO.shape[0], self.w_IO.shape[0]
        if begin < count:
            _round_digits(errors_BO, 0)
        for at in range(begin, count, _SPREAD):
            factor_BN = factor_II[first:begin, at : at + _SPREAD]
            self.w_IO[at : at + _SPREAD].sub_(factor_BN.t() @ errors_BO)


def _add_noise(w_OI: Tensor, quantized: Quantized, noise: Noise) -> float:
    """The sum of squares of what is decoded less the weight, in steps until the end, as float32 may not hold it."""
    rows, groups = quantized.scale.shape
    off_OI = noise.scratch(tuple(w_OI.shape)).copy_(quantized.codes)
    off_OGS, w_OGS = off_OI.view(rows, groups, -1), w_OI.view(rows, groups, -1)
    off_OGS.sub_(quantized.zero_points().float().unsqueeze(-1))
    off_OGS.sub_(w_OGS.div_(quantized.scale.float().unsqueeze(-1)))
    return squares(torch.linalg.vector_norm(off_OGS, dim=2).double() * quantized.scale.double())
