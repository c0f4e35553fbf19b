"""Language models that also look at pictures: the language model is quantized, the tower and projector stay."""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.blocks import LLAMA_BLOCKS
from quantconvert.families.common import (
    DECODER_PARTS,
    EMBEDDINGS,
    EXPERT_NAMES,
    FUSED_COMMON,
    KEEP_HEADS,
    KEEP_VISION,
    LINEAR_ATTENTION,
    LINEAR_MLP,
)
from quantconvert.families.dense import LLAMA_FOLDS
from quantconvert.families.folds import FOLD_UP, FOLDS_EXPERTS, MLP_IN, OUTS
from quantconvert.families.moe import QWEN_DIMS, QWEN_LINEAR, ROUTER, fused_gated, gated_dims
from quantconvert.families.row import Family, Fold, Part

# A checkpoint of Pixtral's tower alone bears this model_type.
_PARTS = tuple(replace(part, unless=("model_type", ("pixtral",))) for part in DECODER_PARTS)

# Around a language model of Llama's layout, whichever `text_config` names (Llama, Mistral, Qwen2, Gemma 3).
VISION_LANGUAGE = Family(
    name="vision-language",
    model_types=(
        "llava", "llava_next", "llava_onevision", "mistral3", "pixtral", "gemma3", "qwen2_vl", "qwen2_vl_text",
        "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text",
    ),
    linear=(LINEAR_ATTENTION, LINEAR_MLP),
    keep=(*KEEP_VISION, *KEEP_HEADS),
    fused=FUSED_COMMON,
    dims=gated_dims(r"layers\.N\.mlp", "intermediate_size"),
    parts=_PARTS,
    folds=LLAMA_FOLDS,
    unfolded=OUTS,
    blocks=LLAMA_BLOCKS,
)  # fmt: skip

# The Hub holds experts [in, out] beside a config with `num_experts`. transformers 5 transposes while it loads, where
# the shape calls for it, but not back when it saves (`core_model_loading.py`, `Transpose(check_dims=True)`), and
# renames the key: its rows come second, and the config's keys tell which are meant.
QWEN3_VL_MOE = Family(
    name="qwen3-vl-moe",
    model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
    linear=QWEN_LINEAR,
    keep=(*KEEP_VISION, *ROUTER, *KEEP_HEADS),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
    fused_experts=(
        *fused_gated("num_experts", "moe_intermediate_size", transposed=True),
        *fused_gated("num_local_experts", "moe_intermediate_size"),
    ),
    dims=QWEN_DIMS,
    parts=DECODER_PARTS,
    folds=FOLDS_EXPERTS,
    unfolded=OUTS,
)

# AltUp mixes four streams by matrices of four columns, and LAuReL and the inputs of each layer are narrow: all of that
# stays. Some layers share the keys and values of others. Towers: MobileNet and a Conformer.
GEMMA3N = Family(
    name="gemma3n",
    model_types=("gemma3n", "gemma3n_text"),
    linear=(LINEAR_ATTENTION, LINEAR_MLP),
    keep=(
        *KEEP_VISION,
        (r"(^|\.)embed_vision(\.|$)", "vision"),
        (r"(^|\.)(audio_tower|embed_audio)(\.|$)", "audio"),
        (r"\.altup\.", "family"),
        (r"\.laurel\.", "family"),
        (r"\.(per_layer_input_gate|per_layer_projection)$", "family"),
        (r"(^|\.)(per_layer_model_projection|(altup_projections|altup_unembed_projections)\.N)$", "head"),
        *KEEP_HEADS,
    ),
    fused=FUSED_COMMON,
    parts=(EMBEDDINGS, Part("embeddings of each layer", ("embed_tokens_per_layer",)), Part("final norm", ("norm",))),
    uneven=(r"^self_attn\.(k_proj|v_proj|k_norm|v_norm)\.",),
    # What the first norm gives is LAuReL's residual too, and values have a norm of their own
    folds=(Fold("pre_feedforward_layernorm", MLP_IN), FOLD_UP),
    unfolded=(*OUTS, r"^self_attn\.[qkv]_proj$", r"^(altup|laurel)\.", r"^per_layer_(input_gate|projection)$"),
)
