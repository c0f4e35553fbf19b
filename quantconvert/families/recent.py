"""Decoders published in 2025 and 2026, most of them mixtures of experts.

Names and shapes: transformers' model files and `conversion_mapping.py` (source patterns are the Hub's layout).
What engines keep: vLLM's `kda.py`, `kimi_linear.py`, `step3p5.py`, `gemma4.py` and `deepseek_v2.py`.
"""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.common import (
    DECODER_PARTS,
    EMBEDDINGS,
    EXPERT_NAMES,
    FUSED_COMMON,
    FUSED_QKV,
    KEEP_HEADS,
    KEEP_MTP,
    KEEP_VISION,
    LINEAR_ATTENTION,
    LINEAR_MLP,
)
from quantconvert.families.moe import (
    FUSED_QKV_A,
    GATE_UP,
    GATED,
    GRANITE_LINEAR,
    fused_gated,
    gated_dims,
)
from quantconvert.families.row import Family, FusedExperts, FusedSet, Part, Reason

_ATTENTION = r"\.(self_attn|attention)\.(q_proj|k_proj|v_proj|o_proj|g_proj|gate_proj|dense)$"
_EXPERTS = rf"\.(mlp|moe|block_sparse_moe)\.(experts\.N|shared_experts?|shared_mlp)\.{GATED}"
_ROUTER: tuple[tuple[str, Reason], ...] = (
    (r"\.(mlp|moe|block_sparse_moe)\.(gate|router|shared_expert_gate)(\.|$)", "router"),
    (r"(^|\.)(router_bias|expert_bias|e_score_correction_bias|moe_statics)(\.|$)", "router"),
)
_LATENT = r"\.(self_attn|attention)\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$"

# Experts one by one or, as transformers saves Granite's and Ernie's vision kin, all of a layer in one.
ROUTED = Family(
    name="routed",
    model_types=(
        "ernie4_5_moe", "hunyuan_v1_moe", "mimo_v2_flash", "dots1", "exaone_moe", "afmoe", "solar_open", "mellum",
        "hy_v3", "flex_olmo", "cohere2_moe", "laguna", "beam", "glm4v_moe", "glm4v_moe_text", "unlimited_ocr",
    ),
    linear=(_ATTENTION, LINEAR_MLP, _EXPERTS),
    keep=(*KEEP_MTP, *KEEP_VISION, *_ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    parts=DECODER_PARTS,
    uneven=(r"^mlp\.moe_statics\.",),
)  # fmt: skip

# Latent attention, indexers in some.
ROUTED_LATENT = Family(
    name="routed-latent",
    model_types=("axk1", "axk2", "dots3_note", "dots3_note_text"),
    linear=(
        r"\.self_attn\.(q_proj|q_b_proj|o_proj|g_proj|linear_gate)$",
        LINEAR_MLP,
        r"\.mlp\.linear_gate$",
        _EXPERTS,
        r"\.mlp\.shared_experts\.linear_gate$",
    ),
    keep=(
        *KEEP_MTP,
        *KEEP_VISION,
        *_ROUTER,
        (_LATENT, "family"),
        (r"\.indexer\.", "family"),
        *KEEP_HEADS,
    ),
    fused=(*FUSED_COMMON, FUSED_QKV_A, FusedSet("gate_up_proj", ("linear_gate", "up_proj"))),
    experts=EXPERT_NAMES,
    parts=DECODER_PARTS,
    uneven=(r"^self_attn\.indexer\.",),
)

# All experts of a layer in one tensor.
MISTRAL4 = replace(
    ROUTED_LATENT,
    name="mistral4",
    model_types=("mistral4", "hy_v4"),
    fused_experts=fused_gated("n_routed_experts", "moe_intermediate_size"),
)

# What decides how fast the state decays (f), how much is written to it (b) and what of it is read (g) is narrow.
KIMI_LINEAR = Family(
    name="kimi-linear",
    model_types=("kimi_linear", "bailing_hybrid"),
    linear=(_ATTENTION, r"\.self_attn\.q_b_proj$", rf"\.(mlp|block_sparse_moe)\.{GATED}",
            r"\.(mlp|block_sparse_moe)\.experts\.N\.(w1|w2|w3)$", _EXPERTS),
    keep=(
        *KEEP_MTP,
        *_ROUTER,
        (_LATENT, "family"),
        (r"\.(self_attn|attention)\.[qkv]_conv1d(\.|$)", "conv"),
        (r"\.(self_attn|attention)\.(b_proj|f_proj|f_a_proj|f_b_proj|g_a_proj|g_b_proj|A_log|dt_bias)$",
         "state-space"),
        *KEEP_HEADS,
    ),
    fused=(*FUSED_COMMON, FUSED_QKV_A, FusedSet("w13", ("w1", "w3"))),
    experts=EXPERT_NAMES,
    parts=(Part("embeddings", ("embed_tokens", "word_embeddings")), Part("final norm", ("norm",))),
    uneven=(r"^(mlp|block_sparse_moe)\.gate\.",),
)  # fmt: skip

# M3 sees pictures and attends to what an indexer has chosen; transformers saves its text model fused.
MINIMAX = Family(
    name="minimax",
    model_types=("minimax_m2",),
    linear=(
        LINEAR_ATTENTION,
        r"\.mlp\.(gate_up_proj|down_proj|gate_proj|up_proj)$",
        rf"\.block_sparse_moe\.{GATED}",
        r"\.block_sparse_moe\.experts\.N\.(w1|w2|w3)$",
        r"\.(mlp|block_sparse_moe)\.shared_experts\.(gate_proj|up_proj|gate_up_proj|down_proj)$",
        rf"\.mlp\.experts\.N\.{GATED}",
    ),
    keep=(
        *KEEP_MTP,
        *KEEP_VISION,
        (r"(^|\.)patch_merge_mlp(\.|$)", "vision"),
        *_ROUTER,
        (r"\.self_attn\.(indexer|index_\w+)(\.|$)", "family"),
        *KEEP_HEADS,
    ),
    fused=(*FUSED_COMMON, FusedSet("w13", ("w1", "w3"))),
    experts=EXPERT_NAMES,
    parts=DECODER_PARTS,
    uneven=(r"^self_attn\.(indexer|index_)",),
)

MINIMAX_M3 = replace(MINIMAX, name="minimax-m3", model_types=("minimax_m3_vl",))
MINIMAX_M3_TEXT = replace(
    MINIMAX,
    name="minimax-m3-text",
    model_types=("minimax_m3_vl_text",),
    fused_experts=fused_gated("num_local_experts", "intermediate_size"),
)

# Experts stand beside the dense MLP; some layers share the keys and values of others, or have keys alone. What each
# layer adds of its own embeddings is narrow, and stays.
GEMMA4 = Family(
    name="gemma4",
    model_types=(
        "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gemma4_assistant",
        "gemma4_unified_assistant",
    ),
    linear=(LINEAR_ATTENTION, LINEAR_MLP, rf"\.experts\.N\.{GATED}"),
    keep=(
        *KEEP_VISION,
        (r"(^|\.)(embed_vision|vision_embedder)(\.|$)", "vision"),
        (r"(^|\.)(audio_tower|embed_audio)(\.|$)", "audio"),
        (r"\.router\.", "router"),
        (r"\.(per_layer_input_gate|per_layer_projection)$", "family"),
        (r"(^|\.)per_layer_model_projection$", "head"),
        (r"(^|\.)(pre_projection|post_projection|masked_embedding\.centroids)$", "head"),
        *KEEP_HEADS,
    ),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_experts", "moe_intermediate_size"),
    parts=DECODER_PARTS,
    uneven=(r"^self_attn\.(k_proj|v_proj|k_norm|v_norm)\.",),
)  # fmt: skip


def _stacked(experts: str) -> tuple[FusedExperts, ...]:
    wide, narrow = "moe_intermediate_size", "hidden_size"
    return (
        *(FusedExperts(rf"(?<=\.moe)\.{name}$", (name,), experts, wide, narrow) for name in GATE_UP),
        FusedExperts(r"(?<=\.moe)\.down_proj$", ("down_proj",), experts, narrow, wide),
    )


# One 3-D tensor a projection. vLLM reads `moe.experts.N.gate_proj` too.
STEP3 = Family(
    name="step3",
    model_types=("step3p5", "step3p7", "step3p7_text"),
    linear=(_ATTENTION, LINEAR_MLP, rf"\.share_expert\.{GATED}", rf"\.moe\.experts\.N\.{GATED}", _EXPERTS),
    keep=(*KEEP_MTP, *KEEP_VISION, (r"(^|\.)vit_large_projector(\.|$)", "vision"), *_ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=(*_stacked("moe_num_experts"), *_stacked("n_routed_experts")),
    parts=DECODER_PARTS,
)

# Attention and a state side by side in every layer.
FALCON_H1 = Family(
    name="falcon-h1",
    model_types=("falcon_h1",),
    linear=(LINEAR_ATTENTION, rf"\.feed_forward\.{GATED}", r"\.mamba\.(in_proj|out_proj)$"),
    keep=((r"\.mamba\.conv1d(\.|$)", "conv"), (r"\.mamba\.(A_log|D|dt_bias)$", "state-space"), *KEEP_HEADS),
    fused=FUSED_COMMON,
    dims=gated_dims("feed_forward", "intermediate_size"),
    parts=(EMBEDDINGS, Part("final norm", ("final_layernorm", "norm"))),
)

# Its experts stand in another width than its layers.
MUSE_SPARK = Family(
    name="muse-spark",
    model_types=("muse_spark", "muse_spark_text"),
    linear=(_ATTENTION, LINEAR_MLP, r"\.mlp\.(pre_expert_proj|post_expert_proj)$", rf"\.mlp\.experts\.N\.{GATED}"),
    keep=(*KEEP_VISION, *_ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_local_experts", "moe_intermediate_size", hidden="moe_hidden_size"),
    parts=DECODER_PARTS,
)

# Named `.weight`, each matrix [in, out] (transformers `modeling_aria.py`, `AriaExperts`).
ARIA = Family(
    name="aria",
    model_types=("aria", "aria_text"),
    linear=(LINEAR_ATTENTION, _EXPERTS),
    keep=(*KEEP_VISION, *_ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated(
        "moe_num_experts", "intermediate_size", transposed=True, patterns=(r"\.experts\.fc1$", r"\.experts\.fc2$")
    ),
    parts=DECODER_PARTS,
)

# A router of three layers, and attention behind two convolutions.
ZAYA = Family(
    name="zaya",
    model_types=("zaya",),
    linear=(
        r"\.self_attn\.o_proj$",
        r"\.self_attn\.qkv_proj\.(q_proj|k_proj|v_proj_current|v_proj_delayed)$",
        rf"\.mlp\.experts\.N\.{GATED}",
    ),
    keep=(*_ROUTER, (r"\.conv_qk_\w+(\.|$)", "conv"), *KEEP_HEADS),
    fused=(FusedSet("gate_up_proj", GATE_UP),),
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_experts", "moe_intermediate_size"),
    parts=DECODER_PARTS,
    uneven=(r"^mlp\.gate\.router_states_scale$",),
)

GRANITE_SWA_MOE = Family(
    name="granite-swa-moe",
    model_types=("granitemoe_swa",),
    linear=GRANITE_LINEAR,
    keep=(*_ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_local_experts", "intermediate_size"),
    parts=DECODER_PARTS,
)

# Mistral's own names.
MISTRAL_LARGE4 = Family(
    name="mistral-large4",
    model_types=("mistral_large4", "mistral_large4_text"),
    linear=(
        r"(^|\.)layers\.N\.attention\.(wq|wq_b|wo)$",
        r"(^|\.)layers\.N\.(feed_forward|experts\.N|shared_experts)\.(w1|w2|w3)$",
    ),
    keep=(
        *KEEP_VISION,
        (r"(^|\.)layers\.N\.gate(\.|$)", "router"),
        (r"\.attention\.(wkv_a_with_mqa|wkv_b|wq_a)$", "family"),
        (r"\.indexer\.", "family"),
        (r"^output$", "lm_head"),
        *KEEP_HEADS,
    ),
    fused=(FusedSet("w13", ("w1", "w3")), FusedSet("fused_wqa_wkv", ("wq_a", "wkv_a_with_mqa"))),
    experts=r"(^|\.)layers\.N\.experts\.N\.",
    parts=(Part("embeddings", ("tok_embeddings",)), Part("final norm", ("norm",))),
    uneven=(r"^attention\.indexer\.", r"^gate\."),
)

# Queries, keys, values and outputs as the Hub calls them; the rows of gate and up take turns.
INKLING = Family(
    name="inkling",
    model_types=("inkling_mm_model", "inkling2", "inkling_text", "inkling2_text"),
    linear=(
        LINEAR_ATTENTION,
        r"\.self_attn\.(r_proj|gate_proj)$",
        r"\.attn\.(wq_du|wk_dv|wv_dv|wr_du|wo_ud|gate_attn)$",
        LINEAR_MLP,
        r"\.mlp\.(w13_dn|w2_md)$",
        rf"\.mlp\.(experts|shared_experts)\.N\.{GATED}",
    ),
    keep=(
        *KEEP_VISION,
        (r"(^|\.)audio(\.|$)", "audio"),
        (r"(^|\.)unembed$", "lm_head"),
        (r"(^|\.)(embed|embed_norm)$", "embedding"),
        (r"\.mlp\.shared_experts\.(shared_w13_weight|shared_w2_weight|gate_proj|up_proj|down_proj)$", "family"),
        *_ROUTER,
        (r"\.(attn_sink_proj|sink_proj)$", "family"),
        (r"sconv(\.|$)|_convolution(\.|$)", "conv"),
        (r"\.rel_logits_proj\.", "family"),
        *KEEP_HEADS,
    ),
    fused=(*FUSED_QKV, FusedSet("gate_up_proj", GATE_UP), FusedSet("qkv_proj", ("wq_du", "wk_dv", "wv_dv"))),
    experts=r"\.(experts|shared_experts)\.N\.",
    fused_experts=(
        *fused_gated(
            "n_routed_experts", "moe_intermediate_size", interleaved=True,
            patterns=(r"\.experts\.w13_weight$", r"\.experts\.w2_weight$"),
        ),
        *fused_gated("n_routed_experts", "moe_intermediate_size"),
    ),
    parts=(Part("embeddings", ("embed_tokens", "embed")), Part("final norm", ("norm",))),
)  # fmt: skip

# Attention is a mixture too: each expert has queries and outputs of its own, keys and values are shared.
JETMOE = Family(
    name="jetmoe",
    model_types=("jetmoe",),
    linear=(r"\.self_attention\.kv_proj$", rf"\.mlp\.experts\.N\.{GATED}"),
    keep=(
        (r"\.router(\.|$)", "router"),
        (r"\.self_attention\.experts\.(input_linear|output_linear)$", "family"),
        *KEEP_HEADS,
    ),
    fused=(FusedSet("gate_up_proj", GATE_UP),),
    experts=EXPERT_NAMES,
    fused_experts=fused_gated(
        "num_local_experts",
        "intermediate_size",
        patterns=(r"(?<=\.mlp)\.input_linear$", r"(?<=\.mlp)\.output_linear$"),
    ),
    parts=DECODER_PARTS,
)

RECENT = (
    ROUTED, ROUTED_LATENT, MISTRAL4, KIMI_LINEAR, MINIMAX, MINIMAX_M3, MINIMAX_M3_TEXT, GEMMA4, STEP3, FALCON_H1,
    MUSE_SPARK, ARIA, ZAYA, GRANITE_SWA_MOE, MISTRAL_LARGE4, INKLING, JETMOE,
)  # fmt: skip
