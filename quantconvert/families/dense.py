"""Decoders without experts. Names and shapes: transformers' model files; fused sets: vLLM's packed_modules_mapping."""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.blocks import GLM_BLOCKS, LLAMA_BLOCKS, PHI3_BLOCKS
from quantconvert.families.common import (
    DECODER_PARTS,
    EMBEDDINGS,
    FUSED_COMMON,
    FUSED_QKV,
    KEEP_HEADS,
    LINEAR_ATTENTION,
    LINEAR_MLP,
)
from quantconvert.families.folds import FOLD_UP, FOLD_V, MLP_IN, OUTS, QKV, only, pre_norm
from quantconvert.families.row import Dims, Family, Fold, Part
from quantconvert.families.streams import stream

_MLP_DIMS = (
    Dims(r"\.mlp\.(gate_proj|up_proj)$", "intermediate_size", "hidden_size"),
    Dims(r"\.mlp\.down_proj$", "hidden_size", "intermediate_size"),
)

# A norm in front of each half of a layer, a gated MLP, nothing else between them; the last are vision-language models'.
_PRE_NORM = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "granite", "smollm3", "seed_oss", "helium",
    "hunyuan_v1_dense", "ernie4_5", "cwm", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl",
    "qwen3_vl_text",
)  # fmt: skip
_GEMMA3 = ("gemma3", "gemma3_text")
_GEMMA = ("gemma2", "vaultgemma", *_GEMMA3)
# One norm before attention and MLP. StableLM may be built so, or with two.
_PARALLEL = Fold("input_layernorm", (*QKV, *MLP_IN))
# OLMo's norms have no weights; those of OLMo 2 and 3 and of EXAONE 4 come after attention and MLP.
_GATED = (*_PRE_NORM, "gemma", *_GEMMA, "cohere", "cohere2", "stablelm", "olmo", "olmo2", "olmo3", "exaone4")
_UNGATED = ("nemotron", "arcee", "apertus", "jais2")
_STABLELM = ("use_parallel_residual", (True,))

LLAMA_FOLDS = (
    *only(_PRE_NORM, *pre_norm()),
    *only(("gemma",), *pre_norm(kind="1 + norm")),
    *only(_GEMMA, *pre_norm(kind="1 + norm", second="pre_feedforward_layernorm")),
    *only(("cohere", "cohere2"), _PARALLEL),
    *only(("stablelm",), replace(_PARALLEL, where=_STABLELM), *(replace(f, unless=_STABLELM) for f in pre_norm())),
    *only(("nemotron",), *pre_norm("mlp.up_proj", kind="1 + norm")),
    *only(("arcee", "jais2"), *pre_norm("mlp.up_proj")),
    *only(("apertus",), Fold("attention_layernorm", QKV), Fold("feedforward_layernorm", ("mlp.up_proj",))),
    *only(tuple(name for name in (*_GATED, *_UNGATED) if name not in _GEMMA3), FOLD_V),
    *only(_GEMMA3, replace(FOLD_V, head_dim=256)),  # the 4B's config does not say it
    *only(_GATED, FOLD_UP),
)

LLAMA_STREAMS = (
    *stream(
        ("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "granite", "smollm3", "seed_oss", "helium",
         "hunyuan_v1_dense", "ernie4_5", "cwm", "gemma", "arcee"),
    ),
    *stream(("vaultgemma",), norms=("input_layernorm", "pre_feedforward_layernorm")),
    *stream(("apertus",), norms=("attention_layernorm", "feedforward_layernorm")),
)  # fmt: skip

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
    blocks=LLAMA_BLOCKS,
    folds=LLAMA_FOLDS,
    unfolded=OUTS,
    streams=LLAMA_STREAMS,
)  # fmt: skip

# Gate and up one after the other.
_FUSED_UP = Fold("mlp.gate_up_proj", ("mlp.down_proj",), "rows")

# Stored as engines load them, already fused (transformers `modeling_phi3.py`): nothing to keep in step.
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    linear=(r"\.self_attn\.(qkv_proj|o_proj)$", r"\.mlp\.(gate_up_proj|down_proj)$"),
    keep=KEEP_HEADS,
    dims=_MLP_DIMS,
    blocks=PHI3_BLOCKS,
    parts=DECODER_PARTS,
    folds=(
        *pre_norm("mlp.gate_up_proj", attention=("self_attn.qkv_proj",)),
        Fold("self_attn.qkv_proj", ("self_attn.o_proj",), "rows", heads=True),
        _FUSED_UP,
    ),
    unfolded=OUTS,
    streams=stream(("phi3",), values=None),
)

# gate_up_proj is stored fused, query, key and value are not (transformers `modeling_glm.py`, `modeling_glm4.py`).
GLM = Family(
    name="glm",
    model_types=("glm", "glm4"),
    linear=(LINEAR_ATTENTION, r"\.mlp\.(gate_up_proj|down_proj)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=_MLP_DIMS,
    blocks=GLM_BLOCKS,
    parts=DECODER_PARTS,
    folds=(*pre_norm("mlp.gate_up_proj"), FOLD_V, _FUSED_UP),
    unfolded=OUTS,
    streams=stream(("glm",)),
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
    folds=(
        Fold("input_layernorm", (*QKV, "mlp.fc1")),
        Fold("self_attn.v_proj", ("self_attn.dense",), "rows", heads=True),
    ),
    unfolded=(r"^(self_attn\.dense|mlp\.fc2)$",),
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
    folds=(*pre_norm("mlp.c_fc"), FOLD_V),
    unfolded=(*OUTS, r"^mlp\.c_proj$"),
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
    # Mamba 2 has a norm of its own behind the state; what is before it passes a convolution and an activation
    folds=(Fold("norm", ("mixer.in_proj",)), Fold("mixer.norm", ("mixer.out_proj",))),
    unfolded=(r"^mixer\.(out_proj|x_proj|dt_proj|A_log)$",),
)
