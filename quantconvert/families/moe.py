"""Mixtures of experts.

Names and shapes: transformers' model files and `conversion_mapping.py` (the Hub's layout is that of the source
patterns); fused sets: vLLM's packed_modules_mapping. Fused experts become the names that vLLM's `RoutedExperts` reads
(`fused_moe/routed_experts.py`, `build_expert_params_mapping`): gate_proj, up_proj and down_proj unless a model says
otherwise.
"""

from __future__ import annotations

from quantconvert.families.blocks import GRANITE_MOE_BLOCKS, MIXTRAL_BLOCKS, OLMOE_BLOCKS, QWEN_MOE_BLOCKS
from quantconvert.families.common import (
    DECODER_PARTS,
    EXPERT_NAMES,
    FUSED_COMMON,
    KEEP_HEADS,
    KEEP_VISION,
    LINEAR_ATTENTION,
    LINEAR_MLP,
)
from quantconvert.families.row import Dims, Family, FusedExperts, FusedSet, Reason

GATED = r"(gate_proj|up_proj|down_proj)$"
GATE_UP = ("gate_proj", "up_proj")
ROUTER: tuple[tuple[str, Reason], ...] = ((r"\.mlp\.(gate|shared_expert_gate)(\.|$)", "router"),)


def gated_dims(stem: str, width: str, hidden: str = "hidden_size") -> tuple[Dims, ...]:
    """The shapes of gate_proj, up_proj and down_proj under `stem` (a regular expression)."""
    return (Dims(rf"\.{stem}\.(gate_proj|up_proj)$", width, hidden), Dims(rf"\.{stem}\.down_proj$", hidden, width))


def fused_gated(
    experts: str, width: str, transposed: bool = False, interleaved: bool = False, bias: str | None = None
) -> tuple[FusedExperts, ...]:
    """Rows for `experts.gate_up_proj` and `experts.down_proj`, which have no `.weight` in their names."""
    return (
        FusedExperts(
            r"\.experts\.gate_up_proj$", GATE_UP, experts, width, "hidden_size", transposed, interleaved, bias
        ),
        FusedExperts(r"\.experts\.down_proj$", ("down_proj",), experts, "hidden_size", width, transposed, False, bias),
    )


MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    linear=(LINEAR_ATTENTION, r"\.block_sparse_moe\.experts\.N\.(w1|w2|w3)$"),
    keep=((r"\.block_sparse_moe\.gate$", "router"), *KEEP_HEADS),
    fused=(*FUSED_COMMON, FusedSet("w13", ("w1", "w3"))),
    experts=EXPERT_NAMES,
    blocks=MIXTRAL_BLOCKS,
    dims=(
        Dims(r"\.experts\.N\.(w1|w3)$", "intermediate_size", "hidden_size"),
        Dims(r"\.experts\.N\.w2$", "hidden_size", "intermediate_size"),
    ),
    parts=DECODER_PARTS,
)

QWEN_LINEAR = (LINEAR_ATTENTION, LINEAR_MLP, rf"\.mlp\.(experts\.N|shared_expert)\.{GATED}")
QWEN_DIMS = (
    *gated_dims("mlp", "intermediate_size"),
    *gated_dims(r"experts\.N", "moe_intermediate_size"),
    *gated_dims("shared_expert", "shared_expert_intermediate_size"),
)

QWEN_MOE = Family(
    name="qwen-moe",
    model_types=("qwen2_moe", "qwen3_moe"),
    linear=QWEN_LINEAR,
    keep=(*ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    blocks=QWEN_MOE_BLOCKS,
    dims=QWEN_DIMS,
    parts=DECODER_PARTS,
)

OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    linear=(LINEAR_ATTENTION, rf"\.mlp\.experts\.N\.{GATED}"),
    keep=(*ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    blocks=OLMOE_BLOCKS,
    dims=gated_dims(r"experts\.N", "intermediate_size"),
    parts=DECODER_PARTS,
)

# The extra layer that predicts a second token is known by its number; these are the parts only it has.
_KEEP_MTP_PARTS: tuple[tuple[str, Reason], ...] = ((r"\.(eh_proj|shared_head\.head)$", "mtp"),)
_SHARED_EXPERTS = rf"\.mlp\.(experts\.N|shared_experts)\.{GATED}"
_DENSE_THEN_EXPERTS = (
    *gated_dims("mlp", "intermediate_size"),
    *gated_dims(r"experts\.N", "moe_intermediate_size"),
)

FUSED_QKV_A = FusedSet("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa"))

# kv_b_proj stays dense: SGLang reads it only as a plain or AWQ weight; q_a/kv_a are fused by every engine, and
# SGLang joins packed ones along the wrong axis (`deepseek_weight_loader.py`). The indexer's projections are fused or
# kept in their own precision (vLLM `deepseek_v2.py`, `Indexer`).
DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa", "glm4_moe_lite"),
    linear=(r"\.self_attn\.(q_proj|q_b_proj|o_proj)$", LINEAR_MLP, _SHARED_EXPERTS),
    keep=(
        *ROUTER,
        (r"\.self_attn\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$", "family"),
        (r"\.indexer\.", "family"),
        *_KEEP_MTP_PARTS,
        *KEEP_HEADS,
    ),
    fused=(*FUSED_COMMON, FUSED_QKV_A),
    experts=EXPERT_NAMES,
    dims=_DENSE_THEN_EXPERTS,
    parts=DECODER_PARTS,
    uneven=(r"^self_attn\.indexer\.",),  # GLM's layers share the indexer of another
)

GLM_MOE = Family(
    name="glm-moe",
    model_types=("glm4_moe",),
    linear=(LINEAR_ATTENTION, LINEAR_MLP, _SHARED_EXPERTS),
    keep=(*ROUTER, *_KEEP_MTP_PARTS, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    dims=_DENSE_THEN_EXPERTS,
    parts=DECODER_PARTS,
)

# The rows of gate and up take turns (`modeling_gpt_oss.py`: `gate_up[..., ::2]` is the gate), their biases likewise.
GPT_OSS = Family(
    name="gpt-oss",
    model_types=("gpt_oss",),
    linear=(LINEAR_ATTENTION, rf"\.mlp\.experts\.N\.{GATED}"),
    keep=((r"\.mlp\.router$", "router"), (r"\.mlp\.experts\.(gate_up|down)_proj_bias$", "bias"), *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_local_experts", "intermediate_size", True, True, bias="_bias"),
    dims=gated_dims(r"experts\.N", "intermediate_size"),
    parts=DECODER_PARTS,
)

LLAMA4 = Family(
    name="llama4",
    model_types=("llama4", "llama4_text"),
    linear=(LINEAR_ATTENTION, rf"\.feed_forward\.((experts\.N|shared_expert)\.)?{GATED}"),
    keep=(*KEEP_VISION, (r"\.feed_forward\.router$", "router"), *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_local_experts", "intermediate_size", transposed=True),
    dims=(
        *gated_dims("feed_forward", "intermediate_size_mlp"),
        *gated_dims(r"(experts\.N|shared_expert)", "intermediate_size"),
    ),
    parts=DECODER_PARTS,
)

# What Granite's three kinds of mixtures share. The 3-D tensors do end in `.weight`; the 2-D `shared_mlp.input_linear`
# holds gate and up one after the other, and engines load it as it is (vLLM `granitemoeshared.py`).
GRANITE_LINEAR = (
    LINEAR_ATTENTION,
    rf"\.block_sparse_moe\.experts\.N\.{GATED}",
    r"\.shared_mlp\.(input_linear|output_linear)$",
)
GRANITE_ROUTER: tuple[tuple[str, Reason], ...] = ((r"\.block_sparse_moe\.router(\.|$)", "router"),)
GRANITE_EXPERTS = (
    FusedExperts(
        r"(?<=\.block_sparse_moe)\.input_linear$", GATE_UP, "num_local_experts", "intermediate_size", "hidden_size"
    ),
    FusedExperts(
        r"(?<=\.block_sparse_moe)\.output_linear$",
        ("down_proj",),
        "num_local_experts",
        "hidden_size",
        "intermediate_size",
    ),
)
GRANITE_DIMS = (
    *gated_dims(r"experts\.N", "intermediate_size"),
    Dims(r"\.shared_mlp\.output_linear$", "hidden_size", "shared_intermediate_size"),
)

GRANITE_MOE = Family(
    name="granite-moe",
    model_types=("granitemoe", "granitemoeshared"),
    linear=GRANITE_LINEAR,
    keep=(*GRANITE_ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    blocks=GRANITE_MOE_BLOCKS,
    fused_experts=GRANITE_EXPERTS,
    dims=GRANITE_DIMS,
    parts=DECODER_PARTS,
)
