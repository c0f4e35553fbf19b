"""How engines shard linear layers over tensor-parallel ranks.

Column-parallel layers split out_features, row-parallel ones (the second of each pair) split in_features. Key and value
projections are replicated where there are more ranks than key/value heads. As in vLLM's and SGLang's
`ColumnParallelLinear`, `RowParallelLinear` and `QKVParallelLinear` (`vllm/model_executor/layers/linear.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|down_proj|w2|out_proj|fc2|wo|dense_4h_to_h|c_proj|output\.dense|out_lin|lin2|fc_out"
    r"|ffn_output|Wo|output_linear)$|(?i:attention|attn)\.(dense|o)$"
)
# Layers that hold several projections one after the other: a contiguous share would be all of one and none of another.
_MERGED = re.compile(
    r"(^|\.)(qkv_proj|qkv|gate_up_proj|query_key_value|Wqkv|W_pack|c_attn|in_proj\w*|wqkv|Wi|input_linear)$"
)
_KEY_VALUE = re.compile(r"(^|\.)(k_proj|v_proj)$")


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's share of a weight [O, I]: half-open ranges of rows and columns."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def is_merged(module: str) -> bool:
    """Whether a layer holds several projections, which ranks share one by one."""
    return _MERGED.search(module) is not None


def part_of(module: str, shape: tuple[int, ...], rank: int, size: int, config: Mapping[str, Any]) -> Part | None:
    """What rank `rank` of `size` holds of `module`; None where its dimension does not divide by the ranks."""
    rows, columns = shape
    if size == 1:
        return Part((0, rows), (0, columns))
    if _ROW_PARALLEL.search(module):
        width = columns // size
        return None if columns % size else Part((0, rows), (rank * width, (rank + 1) * width))
    heads = config.get("num_key_value_heads")
    if isinstance(heads, int) and 0 < heads < size and size % heads == 0 and _KEY_VALUE.search(module):
        rank, size = rank // (size // heads), heads
    height = rows // size
    return None if rows % size else Part((rank * height, (rank + 1) * height), (0, columns))
