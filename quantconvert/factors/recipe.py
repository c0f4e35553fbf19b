"""Factors from what the weights alone say: the columns of a group brought to a like share of their row's maximum.

Over all rows i of all weights that read one vector x, with the groups g of columns as they will be quantized:

    mu = 1, and twice:  m_ig = max over j in g of |w_ij| / mu_j
                        c_j  = mean over i of (|w_ij| / mu_j) / m_ig
                        mu_j = mu_j c_j
    mu = clamp(mu / median(mu), 1/100, 100)

A group's step is set by its largest column in each row; columns are divided by mu, and what gives x is multiplied by
it. AWQ uses such a mean as one factor of its search (mit-han-lab/llm-awq, `auto_scale.py`, `get_weight_scale`); here
it is iterated, and nothing is searched. Imports torch.

`kernels/native/factors.c` does the same to the bit, so every sum here has one order: rows after rows, as they come.

Shapes: R rows of a block, I columns, G groups of a row, S columns of a group, C factors (I, or fewer where query heads
share them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from quantconvert.factors.wanted import PASSES
from quantconvert.sources.steps.scale import Heads

MOST = 100.0
# The least importance that counts, over the mean.
LEAST_SHARE = 1e-12
# What gives a vector by its rows is scaled down alone: the loudest channel stays as it is.
ROWS_LEAST = 1 / 256
# Engines compute AWQ in float16, whose largest number is 65504. A norm's output is at most sqrt(C) times its gain.
FLOAT16_ROOM = 60_000.0

# Blocks of rows float32 [R, I], which may be overwritten, each with the columns of its groups (None: the whole row).
Blocks = Callable[[], Iterable[tuple[Tensor, int | None]]]


def equalize(blocks: Blocks, count: int, heads: Heads | None = None) -> Tensor:
    """mu float32 [count], as above but for its clamp; 1 where a column is zero in every row, or not finite."""
    mu = torch.ones(count)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(PASSES):
        total = torch.zeros(count * (heads.repeat if heads else 1), dtype=torch.float64)
        rows, inverse = 0, mu.reciprocal()
        for w_RI, group in blocks():
            w_RI.abs_().mul_(heads.spread(inverse) if heads else inverse)
            w_RGS = w_RI.view(len(w_RI), -1, group or w_RI.shape[1])
            w_RGS.mul_(w_RGS.amax(-1, keepdim=True).clamp_(min=tiny).reciprocal_())
            for w_I in w_RI:
                total.add_(w_I)
            rows += len(w_RI)
        mean = ((heads.gathered(total) if heads else total) / max(1, rows)).float()
        mu = (mu * torch.where(torch.isfinite(mean) & (mean > 0), mean, torch.ones(()))).clamp_(min=tiny)
    return mu


def clamped(mu: Tensor) -> Tensor:
    """mu over its median, at most 100 and at least 1/100."""
    return (mu / mu.median()).clamp_(1 / MOST, MOST)


def by_importance(h: Tensor, alpha: float = 0.25) -> Tensor:
    """mu [C] of importances h = E[x_j^2] [C]: (h / mean h)^(-alpha/2), so that loud columns become larger and their
    inputs quieter. Clamped; a column that nothing is known of counts as the mean.
    """
    mean = h[torch.isfinite(h)].mean()
    if not bool(mean > 0):
        return torch.ones_like(h)
    share = torch.where(torch.isfinite(h), h / mean, torch.ones(()))
    return clamped(share.clamp_(min=LEAST_SHARE) ** (-alpha / 2))


def combined(mu: Tensor, h: Tensor, exponent: float = 0.5, alpha: float = 0.25) -> Tensor:
    """Half of what the weights say, and what importances say: mu^exponent times `by_importance`. Clamped."""
    return clamped(clamped(mu) ** exponent * by_importance(h, alpha))


def smooth(maxima_x: Tensor, maxima_w: Tensor, alpha: float = 0.5) -> Tensor:
    """mu [C] of SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4): its columns are multiplied by
    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), so mu = 1 / s.

    maxima_x, maxima_w: [C], the largest magnitude of each input and of its column. Over the median of those columns
    where neither is zero, clamped; 1 for the others.
    """
    mu = maxima_w ** (1 - alpha) / maxima_x**alpha
    known = torch.isfinite(mu) & (mu > 0)
    if not bool(known.any()):
        return torch.ones_like(mu)
    return torch.where(known, (mu / mu[known].median()).clamp_(1 / MOST, MOST), torch.ones(()))


def largest(blocks: Iterable[Tensor], count: int) -> Tensor:
    """max |w_ij| over all rows of float32 blocks [R, count]."""
    found = torch.zeros(count)
    for w_RI in blocks:
        torch.maximum(found, w_RI.abs().amax(0), out=found)
    return found


def joint(vectors: Iterable[Tensor]) -> Tensor:
    """One h [C] for modules of which each has its own: their mean. At least one."""
    several = list(vectors)
    return torch.stack(several).double().mean(0).float()


def calm_rows(mu: Tensor) -> Tensor:
    """The same factors over the largest, so that no channel becomes louder than it was (float16 has no room)."""
    return (mu / mu.max()).clamp_(min=ROWS_LEAST)


def calm_norm(mu: Tensor, gain: Tensor) -> Tensor:
    """The same factors over one number where a norm's output could leave float16: sqrt(C) |gain| mu bounds it."""
    largest = math.sqrt(len(mu)) * float((gain * mu).abs().max())
    return mu * (FLOAT16_ROOM / largest) if largest > FLOAT16_ROOM else mu


def power_of_two(mu: Tensor) -> Tensor:
    """The nearest powers of two by ratio, which every float is multiplied by exactly. mu: float32, at least 2^-126.

    By the bits: adding this carries into the exponent from the first significand above the square root of two on.
    """
    return ((mu.view(torch.int32) + (0x00800000 - 0x003504F4)) & 0x7F800000).view(torch.float32)


def settled(mu: Tensor, vectors: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The factors near `mu` that what gives the vector takes as they are, float32 [C].

    vectors: what is multiplied and stays in its own dtype, [C] each; 1 with those that store w and mean 1 + w, else 0.
    The first is rounded to its dtype, and the factor is what that comes to: exact by construction. Where there is
    another (a LayerNorm's bias), the factor of those nearby is taken with which it needs the least rounding.
    """
    if not vectors:
        return mu
    nearby = torch.arange(-16, 17, dtype=torch.float64) / 256 if len(vectors) > 1 else torch.zeros(1)
    near = mu.double() * (1 + nearby[:, None])
    (first, plus), *others = vectors
    base = first.double() + plus
    stored = (base * near - plus).to(first.dtype).double() + plus
    factor = torch.where(base == 0, near, stored / base)
    usable = torch.isfinite(factor) & (factor > 0)
    loss = torch.where(usable, 0.0, torch.inf).double()
    for vector, more in others:
        wanted = (vector.double() + more) * factor - more
        lost = ((wanted.to(vector.dtype).double() - wanted).abs() / (wanted.abs() + 1e-30)).nan_to_num(torch.inf)
        loss = loss + lost
    best = loss.argmin(0, keepdim=True)
    chosen = factor.gather(0, best)[0].float()
    return torch.where(usable.gather(0, best)[0] & (chosen > 0) & torch.isfinite(chosen), chosen, torch.ones(()))
