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


def unpack_columns(words_OP: Tensor, num_bits: int, columns: int) -> Tensor:
    """The inverse of `pack_columns`: uint8 [O, columns]."""
    flat = words_OP.contiguous().view(-1).view(torch.uint8)
    if num_bits == 4:
        flat = torch.stack((flat & 15, flat >> 4), dim=-1).view(-1)
    return flat.view(words_OP.shape[0], -1)[:, :columns]


def unpack_rows(words_PI: Tensor, num_bits: int, rows: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [rows, I]."""
    return unpack_columns(words_PI.t(), num_bits, rows).t()


def unpack_rows_int4(words_PI: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of `pack_rows_int4`: uint8 [8 * P, I]."""
    blocks = torch.empty(words_PI.shape[0], 8, words_PI.shape[1], dtype=torch.uint8)
    for nibble, row in enumerate(order):
        blocks[:, row] = (words_PI >> (4 * nibble)).bitwise_and_(15)
    return blocks.view(-1, words_PI.shape[1])


def pack_row_pairs(codes_OI: Tensor) -> Tensor:
    """uint8 [ceil(O/2), I]: byte row r holds row 2r in the low nibble and row 2r+1 in the high one (0 past the end)."""
    if codes_OI.shape[0] % 2:
        codes_OI = pad(codes_OI, (0, 0, 0, 1))
    return (codes_OI[1::2] * 16).bitwise_or_(codes_OI[::2])


def unpack_row_pairs(bytes_PI: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_row_pairs`: uint8 [rows, I]."""
    return torch.stack((bytes_PI & 15, bytes_PI >> 4), dim=1).view(-1, bytes_PI.shape[1])[:rows]
