"""Decoders that attend in some layers and keep a recurrent state in the others.

The wide projections into and out of the state are quantized. What steers it (decay, step and gate of each head) is
small and feeds exponentials: it stays, as does the convolution, which no engine reads packed.
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
from quantconvert.families.folds import (
    FOLD_V,
    FOLDS_UP_EXPERTS,
    OUTS,
    QKV,
    READ_BY_EXPERTS,
    gated,
    pre_norm,
    under,
)
from quantconvert.families.moe import (
    GRANITE_DIMS,
    GRANITE_EXPERTS,
    GRANITE_FOLDS,
    GRANITE_LINEAR,
    GRANITE_READERS,
    GRANITE_ROUTER,
    GRANITE_UNFOLDED,
    QWEN_DIMS,
    QWEN_LINEAR,
    ROUTER,
    fused_gated,
    gated_dims,
)
from quantconvert.families.row import Dims, Family, Fold, FusedSet, Part, Reason

_DELTA_STATE: tuple[tuple[str, Reason], ...] = (
    (r"\.linear_attn\.conv1d(\.|$)", "conv"),
    (r"\.linear_attn\.(in_proj_ba|in_proj_a|in_proj_b|A_log|dt_bias)$", "state-space"),
)

_DELTA = (
    *QKV,
    *under("linear_attn", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
# The gate of attention's output is in q_proj. What the state gives has a norm, one for all of its heads.
_DELTA_OUT = (FOLD_V, Fold("linear_attn.norm", ("linear_attn.out_proj",), heads=True))
_DELTA_FOLDS = (*pre_norm(*READ_BY_EXPERTS, attention=_DELTA, kind="1 + norm"), *_DELTA_OUT, *FOLDS_UP_EXPERTS)
_DELTA_UNFOLDED = (*OUTS, r"^linear_attn\.out_proj$")

# Query, key, value and gate interleaved by head in one in_proj_qkvz, as engines load it (vLLM `qwen3_next.py`).
QWEN3_NEXT = Family(
    name="qwen3-next",
    model_types=("qwen3_next",),
    linear=(*QWEN_LINEAR, r"\.linear_attn\.(in_proj_qkvz|out_proj)$"),
    keep=(*KEEP_MTP, *ROUTER, *_DELTA_STATE, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    dims=QWEN_DIMS,
    parts=DECODER_PARTS,
    folds=_DELTA_FOLDS,
    unfolded=_DELTA_UNFOLDED,
)

_QWEN35_LINEAR = r"\.linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$"
_QWEN35_FUSED = (
    *FUSED_COMMON,
    FusedSet("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    FusedSet("in_proj_ba", ("in_proj_b", "in_proj_a")),
)

QWEN35 = Family(
    name="qwen3.5",
    model_types=("qwen3_5", "qwen3_5_text"),
    linear=(LINEAR_ATTENTION, LINEAR_MLP, _QWEN35_LINEAR),
    keep=(*KEEP_MTP, *KEEP_VISION, *_DELTA_STATE, *KEEP_HEADS),
    fused=_QWEN35_FUSED,
    dims=gated_dims("mlp", "intermediate_size"),
    parts=DECODER_PARTS,
    folds=_DELTA_FOLDS,
    unfolded=_DELTA_UNFOLDED,
)

# transformers saves one tensor an expert, the Hub's checkpoints hold all of a layer in one: both are read.
QWEN35_MOE = Family(
    name="qwen3.5-moe",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    linear=(*QWEN_LINEAR, _QWEN35_LINEAR),
    keep=(*KEEP_MTP, *KEEP_VISION, *ROUTER, *_DELTA_STATE, *KEEP_HEADS),
    fused=_QWEN35_FUSED,
    experts=EXPERT_NAMES,
    fused_experts=fused_gated("num_experts", "moe_intermediate_size"),
    dims=QWEN_DIMS,
    parts=DECODER_PARTS,
    folds=_DELTA_FOLDS,
    unfolded=_DELTA_UNFOLDED,
)

GRANITE_HYBRID = Family(
    name="granite-hybrid",
    model_types=("granitemoehybrid",),
    linear=(*GRANITE_LINEAR, r"\.mamba\.(in_proj|out_proj)$"),
    keep=(
        (r"\.mamba\.conv1d(\.|$)", "conv"),
        (r"\.mamba\.(A_log|D|dt_bias)$", "state-space"),
        *GRANITE_ROUTER,
        *KEEP_HEADS,
    ),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=GRANITE_EXPERTS,
    dims=GRANITE_DIMS,
    parts=DECODER_PARTS,
    folds=(
        *pre_norm(*GRANITE_READERS, attention=(*QKV, "mamba.in_proj")),
        Fold("mamba.norm", ("mamba.out_proj",)),
        *GRANITE_FOLDS,
    ),
    unfolded=(*GRANITE_UNFOLDED, r"^mamba\.out_proj$"),
)

# One mixer a layer: a state, attention, experts or an MLP, none of which has a gate_proj. `moe_latent_size` puts
# projections around the experts.
_NEMOTRON_READERS = under(
    "mixer", "in_proj", "q_proj", "k_proj", "v_proj", "up_proj", "gate", "shared_experts.up_proj", "fc1_latent_proj"
)
_NEMOTRON_LATENT = ("moe_latent_size", (None,))

NEMOTRON_H = Family(
    name="nemotron-h",
    model_types=("nemotron_h",),
    linear=(
        r"\.mixer\.(in_proj|out_proj|q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)$",
        r"\.mixer\.(experts\.N|shared_experts)\.(up_proj|down_proj)$",
    ),
    keep=(
        *KEEP_MTP,
        (r"\.mixer\.gate(\.|$)", "router"),
        (r"\.mixer\.(fc1_latent_proj|fc2_latent_proj)$", "family"),
        (r"\.mixer\.conv1d(\.|$)", "conv"),
        (r"\.mixer\.(A_log|D|dt_bias)$", "state-space"),
        *KEEP_HEADS,
    ),
    fused=FUSED_QKV,
    experts=EXPERT_NAMES,
    dims=(
        Dims(r"\.mixer\.up_proj$", "intermediate_size", "hidden_size"),
        Dims(r"\.mixer\.down_proj$", "hidden_size", "intermediate_size"),
        Dims(r"\.shared_experts\.up_proj$", "moe_shared_expert_intermediate_size", "hidden_size"),
        Dims(r"\.shared_experts\.down_proj$", "hidden_size", "moe_shared_expert_intermediate_size"),
    ),
    parts=(Part("embeddings", ("embeddings", "embed_tokens")), Part("final norm", ("norm_f", "norm"))),
    folds=(
        Fold("norm", _NEMOTRON_READERS, unless=_NEMOTRON_LATENT),
        Fold("norm", (*_NEMOTRON_READERS, "mixer.experts.N.up_proj"), where=_NEMOTRON_LATENT),
        Fold("mixer.fc1_latent_proj", ("mixer.experts.N.up_proj",), "rows"),
        Fold("mixer.norm", ("mixer.out_proj",)),
        Fold("mixer.v_proj", ("mixer.o_proj",), "rows", heads=True),
    ),
    unfolded=(*OUTS, r"^mixer\.(out_proj|fc2_latent_proj)$"),
)

# Liquid's: a short convolution between two projections in most layers, attention in the others. LFM3's gate_proj is one
# of attention.
_LFM = ("feed_forward", "feed_forward.experts.N")

LFM2 = Family(
    name="lfm2",
    model_types=("lfm2", "lfm2_moe"),
    linear=(
        r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj|o_proj|gate_proj)$",
        r"\.conv\.(in_proj|out_proj)$",
        r"\.feed_forward\.(experts\.N\.)?(w1|w2|w3)$",
    ),
    keep=(
        (r"\.conv\.conv(\.|$)", "conv"),
        (r"\.feed_forward\.(gate|expert_bias)(\.|$)", "router"),
        *KEEP_HEADS,
    ),
    fused=(*FUSED_QKV, FusedSet("w13", ("w1", "w3"))),
    experts=EXPERT_NAMES,
    dims=(
        Dims(r"\.conv\.out_proj$", "hidden_size", "hidden_size"),
        Dims(r"\.experts\.N\.(w1|w3)$", "moe_intermediate_size", "hidden_size"),
        Dims(r"\.experts\.N\.w2$", "hidden_size", "moe_intermediate_size"),
    ),
    parts=(EMBEDDINGS, Part("final norm", ("embedding_norm",))),
    folds=(
        Fold("operator_norm", (*QKV, "self_attn.gate_proj", "conv.in_proj")),
        Fold("ffn_norm", ("feed_forward.gate", *(name for stem in _LFM for name in under(stem, "w1", "w3")))),
        Fold("self_attn.v_proj", ("self_attn.out_proj", "self_attn.o_proj"), "rows", heads=True),
        # The last third of in_proj goes through the convolution, channel by channel
        Fold("conv.in_proj", ("conv.out_proj",), "rows", unless=("conv_bias", (True,))),
        *gated(*_LFM, up="w3", down="w2"),
    ),
    unfolded=(r"\.(out_proj|o_proj|w2)$",),
)

# The same tables; transformers renames its attention's gate_proj while it loads.
LFM3 = replace(LFM2, name="lfm3", model_types=("lfm3",))
