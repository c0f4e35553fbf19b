"""Random choices of a bag of tokens: which embeddings, and what attention mixes. The same on every machine.

Numbers come from SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), whose state after k steps is seed + k * gamma, so that
any number of the sequence can be had alone. Imports torch.

Legend: N tokens, H query heads.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quantconvert.factors.room import TOKENS

OTHERS = 3
_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A number of 64 bits as torch's int64 holds it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def splitmix64(seed: int, first: int, count: int) -> Tensor:
    """Numbers first..first + count of the sequence that begins with `seed`: int64 [count], the bits of uint64."""
    z = torch.arange(count, dtype=torch.int64) + _signed(first + 1)
    z.mul_(_signed(_GAMMA)).add_(_signed(seed))
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        z.bitwise_xor_((z >> shift) & ((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return z


@dataclass(frozen=True, slots=True)
class Draws:
    """What is drawn for a bag. alone: attention sees a token itself and no other."""

    tokens: int = TOKENS
    seed: int = 0
    alone: bool = False

    def ids(self, vocabulary: int) -> list[int]:
        """[N] ids, each with a probability as 1 / (id + 300): tokenizers give frequent words small numbers."""
        steps = list(accumulate((1 << 40) // (i + 300) for i in range(vocabulary)))
        drawn = splitmix64(self.seed, 0, self.tokens).tolist()
        return [bisect_right(steps, ((number & _MASK) * steps[-1]) >> 64) for number in drawn]

    def mixture(self, layer: int, heads: int) -> tuple[Tensor, Tensor]:
        """For each head of a layer how much of its own value a token keeps, float32 [H, N] in [0, 1), and which three
        other tokens it takes the rest from, int64 [H, N, 3].
        """
        count, each = self.tokens, OTHERS + 1
        drawn = splitmix64(self.seed + 1, layer * heads * count * each, heads * count * each)
        high = ((drawn >> 40) & 0xFFFFFF).view(heads, count, each)
        own = torch.ones(heads, count) if self.alone else high[..., 0].float() / (1 << 24)
        away = 1 + (high[..., 1:] * (count - 1) >> 24)
        return own, (torch.arange(count)[None, :, None] + away) % count
