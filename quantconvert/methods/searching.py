"""The search for each group's range: the ratio of it that loses least, weighted by the importance of each column.

    for r in RATIOS:  s, z = qparams(r low, r high)            as `rounding` does, s in its stored dtype
                      loss = sum_j importance_j (s (clamp(rint(w_j / s + z)) - z) - w_j)^2
    the ratio of the least loss is kept, of equal ones the larger

Losses are compared in steps of the first ratio, in float32, with sums in a fixed order (`_sum`), so that the choice
does not depend on the block, the number of threads or the machine. Imports torch.

Shapes: K ratios, O rows, I columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantconvert.methods.base import BadInputs
from quantconvert.methods.rounding import Range, measure, qparams
from quantconvert.methods.search import SMALLEST_RATIO
from quantconvert.schemes import Scheme

_COUNT = 12
RATIOS = tuple(1 - (1 - SMALLEST_RATIO) * k / (_COUNT - 1) for k in range(_COUNT))
# Values of a block that are searched at a time: what that takes stays in a core's cache.
_CHUNK = 1 << 18


def check_importance(importance_I: Tensor) -> Tensor:
    """The importances over the largest of them, float32 [I]; raises `BadInputs` for what is no mean square."""
    if importance_I.dim() != 1 or not bool(torch.isfinite(importance_I).all()) or bool((importance_I < 0).any()):
        raise BadInputs("an importance is negative, NaN or Inf")
    largest = importance_I.amax()
    return importance_I.float() / torch.where(largest > 0, largest, 1.0)


def best_qparams(
    w_OI: Tensor, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype, importance_I: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Stored scale [O, G] and signed zero point (float32 [O, G]; None when symmetric), as `qparams` gives them.

    w_OI: float32, left as it is. importance_I: float32, up to a common factor. Raises `NonFinite`, `ScaleOverflow`, and
    `BadInputs` where the importances are of another width.
    """
    if importance_I.shape[0] != w_OI.shape[1]:
        raise BadInputs(f"{importance_I.shape[0]} importances for {w_OI.shape[1]} columns")
    step = max(1, _CHUNK // w_OI.shape[1])
    parts = [_best(part, scheme, dtype, scale_dtype, importance_I) for part in torch.split(w_OI, step)]
    zero_points = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None


def _best(
    w_OI: Tensor, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype, importance_I: Tensor
) -> tuple[Tensor, Tensor | None]:
    span = measure(w_OI, scheme)
    ratios_K = torch.tensor(RATIOS).view(-1, 1, 1)
    stored_KOG, zero_KOG = qparams(Range(span.low * ratios_K, span.high * ratios_K), scheme, dtype, scale_dtype)
    scale_KOG = stored_KOG.float()
    loss_KOG = _losses(w_OI, scheme, scale_KOG, zero_KOG, importance_I)
    loss_KOG.mul_((scale_KOG / scale_KOG[0]).square_())
    loss_KOG.masked_fill_(scale_KOG > scale_KOG[0], torch.inf)  # a scale that vanished, and became 1
    best_OG, chosen_OG = loss_KOG[0], torch.zeros(loss_KOG.shape[1:], dtype=torch.int64)
    for k in range(1, len(RATIOS)):
        better_OG = loss_KOG[k] < best_OG
        chosen_OG.masked_fill_(better_OG, k)
        best_OG = torch.where(better_OG, loss_KOG[k], best_OG)
    chosen = chosen_OG.unsqueeze(0)
    return stored_KOG.gather(0, chosen)[0], None if zero_KOG is None else zero_KOG.gather(0, chosen)[0]


def _losses(w_OI: Tensor, scheme: Scheme, scale_KOG: Tensor, zero_KOG: Tensor | None, importance_I: Tensor) -> Tensor:
    """The weighted squared errors of each group in steps of its own scale: [K, O, G]."""
    half, top = scheme.number.midpoint, scheme.number.top
    rows, groups = scale_KOG.shape[1:]
    shape = (w_OI.shape[1] // groups, rows, groups)
    first_SOG = torch.div(w_OI.view(rows, groups, -1).permute(2, 0, 1), scale_KOG[0], out=w_OI.new_empty(shape))
    importance_SOG = importance_I.view(groups, 1, -1).permute(2, 1, 0).expand(shape).contiguous()
    finer_KOG = scale_KOG[0] / scale_KOG
    exact_SOG, rounded_SOG = torch.empty(shape), torch.empty(shape)
    loss_KOG = torch.empty_like(scale_KOG)
    for k in range(len(RATIOS)):
        torch.mul(first_SOG, finer_KOG[k], out=exact_SOG)
        if zero_KOG is not None:
            exact_SOG.add_(zero_KOG[k])
        torch.clamp(exact_SOG, -half, top - half, out=rounded_SOG).round_().sub_(exact_SOG)
        loss_KOG[k] = _sum(rounded_SOG.square_().mul_(importance_SOG))
    return loss_KOG


def _sum(values_SOG: Tensor) -> Tensor:
    """The sum over the first axis, in an order of its own: folded in halves, in place."""
    count = values_SOG.shape[0]
    while count > 1:
        half = (count + 1) // 2
        values_SOG[: count - half].add_(values_SOG[half:count])
        count = half
    return values_SOG[0]
