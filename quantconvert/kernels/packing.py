"""Codes to words. Little-endian throughout: the first value sits in the lowest bits.

Shapes: O rows, I columns, P words. All codes are uint8, unsigned, and below 2^b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_columns(codes_OI: Tensor, num_bits: int) -> Tensor:
    """int32 [O, ceil(I*b/32)]: each word holds 32/b neighbouring columns; unused bits of the last one are 0.

    Agrees with compressed-tensors `pack_to_int32(value + 2^(b-1), packed_dim=1)`.
    """
    per_word = 32 // num_bits
    if codes_OI.shape[1] % per_word:
        codes_OI = pad(codes_OI, (0, -codes_OI.shape[1] % per_word))
    rows = codes_OI.shape[0]
    flat = codes_OI.reshape(-1)  # a column vector is its own transpose in memory, with strides that `view` refuses
    if num_bits == 4:
        pairs = flat.view(torch.int16)  # a byte each; the second code's byte moves down beside the first
        flat = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    return flat.view(torch.int32).view(rows, -1)


def pack_rows(codes_OI: Tensor, num_bits: int) -> Tensor:
    """int32 [ceil(O*b/32), I]: each word holds 32/b neighbouring rows of one column.

    Agrees with compressed-tensors `pack_to_int32(value + 2^(b-1), packed_dim=0)`.
    """
    return pack_columns(codes_OI.t(), num_bits).t().contiguous()


def pack_rows_int4(codes_OI: Tensor, order: Sequence[int]) -> Tensor:
    """int32 [O/8, I]: nibble k of a word holds row `order[k]` of its eight rows. O must be a multiple of 8.

    The transpose of AWQ's `qweight` when `order` is AWQ's.
    """
    rows, columns = codes_OI.shape
    blocks = codes_OI.view(rows // 8, 8, columns)
    words: Tensor | None = None
    for byte in reversed(range(4)):
        low, high = blocks[:, order[2 * byte]], blocks[:, order[2 * byte + 1]]
        plane = (high * 16).bitwise_or_(low)
        words = plane.to(torch.int32) if words is None else words.bitwise_left_shift_(8).bitwise_or_(plane)
    assert words is not None
    return words
