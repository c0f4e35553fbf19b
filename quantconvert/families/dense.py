"""Decoders without experts. Names and shapes: transformers' model files; fused sets: vLLM's packed_modules_mapping."""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.common import (
    DECODER_PARTS,
    EMBEDDINGS,
    FOLDS_PRE_NORM,
    FUSED_COMMON,
    FUSED_QKV,
    KEEP_HEADS,
    LINEAR_ATTENTION,
    LINEAR_MLP,
)
from quantconvert.families.row import Dims, Family, Part

_MLP_DIMS = (
    Dims(r"\.mlp\.(gate_proj|up_proj)$", "intermediate_size", "hidden_size"),
    Dims(r"\.mlp\.down_proj$", "hidden_size", "intermediate_size"),
)

# Gated, with a norm in front of each half of a layer and nothing else (transformers' model files).
_PRE_NORM = ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "ministral")

# Those without a gate_proj (nemotron, arcee, apertus, jais2) have the same names otherwise.
LLAMA = Family(
    name="llama",
    model_types=(
        "llama", "mistral", "mistral3", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
        "gemma3", "vaultgemma", "granite", "smollm3", "olmo", "olmo2", "olmo3", "stablelm", "cohere", "cohere2",
        "seed_oss", "exaone4", "nemotron", "arcee", "apertus", "jais2", "helium", "hunyuan_v1_dense", "ernie4_5", "cwm",
    ),
    linear=(LINEAR_ATTENTION, LINEAR_MLP),
    keep=KEEP_HEADS,
    fused=FUSED_COMMON,
    dims=_MLP_DIMS,
    parts=DECODER_PARTS,
    folds=tuple(replace(fold, only=_PRE_NORM) for fold in FOLDS_PRE_NORM),
)  # fmt: skip

# Stored as engines load them, already fused (transformers `modeling_phi3.py`): nothing to keep in step.
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    linear=(r"\.self_attn\.(qkv_proj|o_proj)$", r"\.mlp\.(gate_up_proj|down_proj)$"),
    keep=KEEP_HEADS,
    dims=_MLP_DIMS,
    parts=DECODER_PARTS,
)

# gate_up_proj is stored fused, query, key and value are not (transformers `modeling_glm.py`, `modeling_glm4.py`).
GLM = Family(
    name="glm",
    model_types=("glm", "glm4"),
    linear=(LINEAR_ATTENTION, r"\.mlp\.(gate_up_proj|down_proj)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=_MLP_DIMS,
    parts=DECODER_PARTS,
)

PHI = Family(
    name="phi",
    model_types=("phi",),
    linear=(r"\.self_attn\.(q_proj|k_proj|v_proj|dense)$", r"\.mlp\.(fc1|fc2)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=(
        Dims(r"\.mlp\.fc1$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.fc2$", "hidden_size", "intermediate_size"),
    ),
    parts=(EMBEDDINGS, Part("final norm", ("final_layernorm",))),
)

STARCODER2 = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    linear=(LINEAR_ATTENTION, r"\.mlp\.(c_fc|c_proj)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=(
        Dims(r"\.mlp\.c_fc$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.c_proj$", "hidden_size", "intermediate_size"),
    ),
    parts=DECODER_PARTS,
)

# Small recurrent projections stay: they feed an exponential, and no engine reads them packed (vLLM `mamba_mixer.py`).
MAMBA = Family(
    name="mamba",
    model_types=("mamba", "mamba2", "falcon_mamba"),
    linear=(r"\.mixer\.(in_proj|out_proj)$",),
    keep=(
        (r"\.mixer\.conv1d(\.|$)", "conv"),
        (r"\.mixer\.(x_proj|dt_proj|A_log|D|dt_bias)$", "state-space"),
        *KEEP_HEADS,
    ),
    dims=(Dims(r"\.mixer\.out_proj$", "hidden_size", "intermediate_size"),),
    parts=(Part("embeddings", ("embeddings", "embedding")), Part("final norm", ("norm_f",))),
)
