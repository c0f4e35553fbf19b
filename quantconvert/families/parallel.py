"""How engines shard linear layers over tensor-parallel ranks.

Column-parallel layers split out_features, row-parallel ones (the second of each pair) split in_features. Key and value
projections are replicated where there are more ranks than key/value heads. As in vLLM's and SGLang's
`ColumnParallelLinear`, `RowParallelLinear` and `QKVParallelLinear` (`vllm/model_executor/layers/linear.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantconvert.families.row import FusedSet

_ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|down_proj|w2|out_proj|fc2|wo|dense_4h_to_h|c_proj|output\.dense|out_lin|lin2|fc_out"
    r"|ffn_output|Wo|output_linear)$|(?i:attention|attn)\.(dense|o)$"
)
# Layers that hold several projections one after the other: a contiguous share would be all of one and none of another.
_MERGED = re.compile(
    r"(^|\.)(qkv_proj|qkv|gate_up_proj|query_key_value|Wqkv|W_pack|c_attn|in_proj\w*|wqkv|Wi|input_linear)$"
)
# Attention whose queries and keys come from two inputs: only its keys and values can be one layer.
_CROSS = re.compile(r"(^|\.)(encoder_attn|EncDecAttention|cross_attn|crossattention)$")
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


def merged_layers(modules: Iterable[str], fused: Sequence[FusedSet]) -> dict[str, tuple[str, ...]]:
    """The layers that engines load as one, whole sets of `modules` alone: its name, and its members in their order.

    Of sets that overlap the largest counts; in cross-attention the smallest.
    """
    known, found = dict.fromkeys(modules), dict[str, tuple[str, ...]]()
    taken: set[str] = set()
    for cross in (False, True):
        for fused_set in sorted(fused, key=lambda f: len(f.members), reverse=not cross):
            for module in known:
                stem, dot, last = module.rpartition(".")
                members = tuple(f"{stem}{dot}{member}" for member in fused_set.members)
                if last != fused_set.members[0] or bool(_CROSS.search(stem)) != cross or taken.intersection(members):
                    continue
                if all(member in known for member in members):
                    found[f"{stem}{dot}{fused_set.name}"] = members
                    taken.update(members)
    return found


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
