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
from quantconvert.families.folds import (
    FOLD_V,
    FOLDS_EXPERTS,
    FOLDS_UP_EXPERTS,
    OUTS,
    READ_BY_EXPERTS,
    gated,
    pre_norm,
    under,
)
from quantconvert.families.row import Dims, Family, Fold, FusedExperts, FusedSet, Reason
from quantconvert.families.streams import EXPERT_WRITERS, LATENT_VALUES, stream

GATED = r"(gate_proj|up_proj|down_proj)$"
GATE_UP = ("gate_proj", "up_proj")
ROUTER: tuple[tuple[str, Reason], ...] = ((r"\.mlp\.(gate|shared_expert_gate)(\.|$)", "router"),)


def gated_dims(stem: str, width: str, hidden: str = "hidden_size") -> tuple[Dims, ...]:
    """The shapes of gate_proj, up_proj and down_proj under `stem` (a regular expression)."""
    return (Dims(rf"\.{stem}\.(gate_proj|up_proj)$", width, hidden), Dims(rf"\.{stem}\.down_proj$", hidden, width))


def fused_gated(
    experts: str,
    width: str,
    transposed: bool = False,
    interleaved: bool = False,
    bias: str | None = None,
    *,
    hidden: str = "hidden_size",
    patterns: tuple[str, str] = (r"\.experts\.gate_up_proj$", r"\.experts\.down_proj$"),
) -> tuple[FusedExperts, ...]:
    """Rows for gate and up in one tensor and down in another; `patterns`: how the two are called."""
    first, second = patterns
    return (
        FusedExperts(first, GATE_UP, experts, width, hidden, transposed, interleaved, bias),
        FusedExperts(second, ("down_proj",), experts, hidden, width, transposed, False, bias),
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
    folds=(
        *pre_norm("block_sparse_moe.gate", *under("block_sparse_moe.experts.N", "w1", "w3")),
        FOLD_V,
        *gated("block_sparse_moe.experts.N", up="w3", down="w2"),
    ),
    unfolded=(*OUTS, r"\.w2$"),
    streams=stream(("mixtral",), "block_sparse_moe.experts.N.w2"),
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
    folds=FOLDS_EXPERTS,
    unfolded=OUTS,
    streams=stream(("qwen2_moe", "qwen3_moe"), *EXPERT_WRITERS),
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
    folds=FOLDS_EXPERTS,
    unfolded=OUTS,
    streams=stream(("olmoe",), *EXPERT_WRITERS, values=None),  # which may be clamped
)

# The extra layer that predicts a second token is known by its number; these are the parts only it has.
_KEEP_MTP_PARTS: tuple[tuple[str, Reason], ...] = ((r"\.(eh_proj|shared_head\.head)$", "mtp"),)
_SHARED_EXPERTS = rf"\.mlp\.(experts\.N|shared_experts)\.{GATED}"
_DENSE_THEN_EXPERTS = (
    *gated_dims("mlp", "intermediate_size"),
    *gated_dims(r"experts\.N", "moe_intermediate_size"),
)

# The latents have norms of their own, whose weights end before the projections that read them. In kv_b_proj keys and
# values take turns head by head, so that o_proj has no giver. The rest stands in layers that predict a second token.
MLA = under("self_attn", "q_proj", "q_a_proj", "kv_a_proj_with_mqa", "indexer.wk", "indexer.weights_proj")
FOLDS_LATENT = (
    Fold("self_attn.q_a_layernorm", ("self_attn.q_b_proj", "self_attn.indexer.wq_b")),
    Fold("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
)
MTP_PARTS = (r"^(eh_proj|embed_tokens|shared_head\.head)$",)

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
    folds=(*pre_norm(*READ_BY_EXPERTS, attention=MLA), *FOLDS_LATENT, *FOLDS_UP_EXPERTS),
    unfolded=(*OUTS, *MTP_PARTS),
    streams=stream(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa", "glm4_moe_lite"),
        *EXPERT_WRITERS,
        values=LATENT_VALUES,
    ),
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
    folds=FOLDS_EXPERTS,
    unfolded=(*OUTS, *MTP_PARTS),
    streams=stream(("glm4_moe",), *EXPERT_WRITERS),
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
    # What up gives is clamped, and one is added
    folds=(*pre_norm("mlp.router", *under("mlp.experts.N", *GATE_UP)), FOLD_V),
    unfolded=OUTS,
)

_LLAMA4 = ("feed_forward", "feed_forward.experts.N", "feed_forward.shared_expert")

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
    folds=(
        *pre_norm("feed_forward.router", *(name for stem in _LLAMA4 for name in under(stem, *GATE_UP))),
        FOLD_V,
        *gated(*_LLAMA4),
    ),
    unfolded=OUTS,
)

# What Granite's three kinds of mixtures share. The 3-D tensors do end in `.weight`; the 2-D `shared_mlp.input_linear`
# holds gate and up one after the other, and engines load it as it is (vLLM `granitemoeshared.py`).
GRANITE_LINEAR = (
    LINEAR_ATTENTION,
    rf"\.block_sparse_moe\.experts\.N\.{GATED}",
    r"\.shared_mlp\.(input_linear|output_linear)$",
)
GRANITE_ROUTER: tuple[tuple[str, Reason], ...] = ((r"\.block_sparse_moe\.router(\.|$)", "router"),)
GRANITE_EXPERTS = fused_gated(
    "num_local_experts",
    "intermediate_size",
    patterns=(r"(?<=\.block_sparse_moe)\.input_linear$", r"(?<=\.block_sparse_moe)\.output_linear$"),
)
GRANITE_DIMS = (
    *gated_dims(r"experts\.N", "intermediate_size"),
    Dims(r"\.shared_mlp\.output_linear$", "hidden_size", "shared_intermediate_size"),
)

GRANITE_READERS = (
    "block_sparse_moe.router.layer",
    *under("block_sparse_moe.experts.N", *GATE_UP),
    "shared_mlp.input_linear",
)
GRANITE_FOLDS = (
    FOLD_V,
    *gated("block_sparse_moe.experts.N"),
    *gated("shared_mlp", up="input_linear", down="output_linear"),
)
GRANITE_UNFOLDED = (*OUTS, r"\.output_linear$")

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
    folds=(*pre_norm(*GRANITE_READERS), *GRANITE_FOLDS),
    unfolded=GRANITE_UNFOLDED,
    streams=stream(
        ("granitemoe", "granitemoeshared"), "block_sparse_moe.experts.N.down_proj", "shared_mlp.output_linear"
    ),
)
