"""Mixtures of experts."""

from __future__ import annotations

from quantconvert.families.common import EXPERT_NAMES, FUSED_COMMON, LINEAR_ATTENTION, LINEAR_MLP
from quantconvert.families.model import Family, FusedSet

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    linear=(LINEAR_ATTENTION, r"\.block_sparse_moe\.experts\.N\.(w1|w2|w3)$"),
    keep=((r"\.block_sparse_moe\.gate$", "router"),),
    fused=(*FUSED_COMMON, FusedSet("w13", ("w1", "w3"))),
    experts=EXPERT_NAMES,
)

QWEN_MOE = Family(
    name="qwen-moe",
    model_types=("qwen2_moe", "qwen3_moe", "olmoe"),
    linear=(LINEAR_ATTENTION, LINEAR_MLP, r"\.mlp\.(experts\.N|shared_expert)\.(gate_proj|up_proj|down_proj)$"),
    keep=((r"\.mlp\.gate$", "router"), (r"\.mlp\.shared_expert_gate$", "router")),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
)

# kv_b_proj stays dense: SGLang reads it only as a plain or AWQ weight; q_a/kv_a are fused by every engine, and
# SGLang joins packed ones along the wrong axis (`deepseek_weight_loader.py`).
DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"),
    linear=(
        r"\.self_attn\.(q_proj|q_b_proj|o_proj)$",
        r"\.mlp\.(gate_proj|up_proj|down_proj)$",
        r"\.mlp\.(experts\.N|shared_experts)\.(gate_proj|up_proj|down_proj)$",
    ),
    keep=(
        (r"\.mlp\.gate$", "router"),
        (r"\.self_attn\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$", "family"),
        (r"\.indexer\.", "family"),
        (r"\.(eh_proj|shared_head\.head)$", "mtp"),
    ),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
)
