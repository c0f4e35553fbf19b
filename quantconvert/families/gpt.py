"""Decoders of the years before Llama: GPT-2 and its kin, OPT, BLOOM, Falcon. Layers may stand under any prefix.

Names and shapes: transformers' model files; fused sets: vLLM's packed_modules_mapping.
"""

from __future__ import annotations

from quantconvert.families.common import EMBEDDINGS, FUSED_QKV, KEEP_HEADS
from quantconvert.families.row import Dims, Family, Part

_GPT2_LINEAR = (r"\.(attn|crossattention)\.(c_attn|q_attn|c_proj)$", r"\.mlp\.(c_fc|c_proj)$")
_GPT2_KEEP = ((r"(^|\.)(multiple_choice_head|summary)(\.|$)", "head"), *KEEP_HEADS)
_GPT2_DIMS = (
    Dims(r"\.attn\.c_proj$", "n_embd", "n_embd"),
    Dims(r"\.mlp\.c_fc$", "n_inner", "n_embd"),
    Dims(r"\.mlp\.c_proj$", "n_embd", "n_inner"),
)

_TABLE = Part("embeddings", ("wte", "tokens_embed"))
_WORDS = Part("embeddings", ("word_embeddings",))
_LN_F = Part("final norm", ("ln_f",), unless=("model_type", ("openai-gpt",)))
_GPT2_PARTS = (_TABLE, Part("position embeddings", ("wpe", "positions_embed")), _LN_F)

# All of these are Conv1D, stored [in, out] (transformers `pytorch_utils.py`).
GPT2 = Family(
    name="gpt2",
    model_types=("gpt2", "openai-gpt"),
    linear=_GPT2_LINEAR,
    keep=_GPT2_KEEP,
    transposed=_GPT2_LINEAR,
    dims=_GPT2_DIMS,
    parts=_GPT2_PARTS,
)

# The same names, but ordinary linear layers (transformers `modeling_gpt_bigcode.py`).
GPT_BIGCODE = Family(
    name="gpt-bigcode",
    model_types=("gpt_bigcode",),
    linear=_GPT2_LINEAR,
    keep=_GPT2_KEEP,
    dims=_GPT2_DIMS,
    parts=_GPT2_PARTS,
)

GPT_NEO = Family(
    name="gpt-neo",
    model_types=("gpt_neo",),
    linear=(r"\.attn\.attention\.(q_proj|k_proj|v_proj|out_proj)$", r"\.mlp\.(c_fc|c_proj)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=(
        Dims(r"\.attn\.attention\.(q_proj|k_proj|v_proj|out_proj)$", "hidden_size", "hidden_size"),
        Dims(r"\.mlp\.c_fc$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.c_proj$", "hidden_size", "intermediate_size"),
    ),
    parts=_GPT2_PARTS,
)

GPT_J = Family(
    name="gpt-j",
    model_types=("gptj",),
    linear=(r"\.attn\.(q_proj|k_proj|v_proj|out_proj)$", r"\.mlp\.(fc_in|fc_out)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=(
        Dims(r"\.attn\.(q_proj|k_proj|v_proj|out_proj)$", "n_embd", "n_embd"),
        Dims(r"\.mlp\.fc_in$", "n_inner", "n_embd"),
        Dims(r"\.mlp\.fc_out$", "n_embd", "n_inner"),
    ),
    parts=(_TABLE, _LN_F),
)

# The same but for query, key and value, which are stored as one.
CODEGEN = Family(
    name="codegen",
    model_types=("codegen",),
    linear=(r"\.attn\.(qkv_proj|out_proj)$", r"\.mlp\.(fc_in|fc_out)$"),
    keep=KEEP_HEADS,
    dims=GPT_J.dims,
    parts=(_TABLE, _LN_F),
)

_MLP_4H = r"\.mlp\.(dense_h_to_4h|dense_4h_to_h)$"

GPT_NEOX = Family(
    name="gpt-neox",
    model_types=("gpt_neox",),
    linear=(r"\.attention\.(query_key_value|dense)$", _MLP_4H),
    keep=((r"(^|\.)embed_out$", "lm_head"), *KEEP_HEADS),
    dims=(
        Dims(r"\.attention\.dense$", "hidden_size", "hidden_size"),
        Dims(r"\.mlp\.dense_h_to_4h$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.dense_4h_to_h$", "hidden_size", "intermediate_size"),
    ),
    parts=(Part("embeddings", ("embed_in",)), Part("final norm", ("final_layer_norm",))),
)

PERSIMMON = Family(
    name="persimmon",
    model_types=("persimmon",),
    linear=(r"\.self_attn\.(query_key_value|dense)$", _MLP_4H),
    keep=KEEP_HEADS,
    dims=(Dims(r"\.self_attn\.dense$", "hidden_size", "hidden_size"), *GPT_NEOX.dims[1:]),
    parts=(EMBEDDINGS, Part("final norm", ("final_layernorm",))),
)

FALCON = Family(
    name="falcon",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    linear=(r"\.self_attention\.(query_key_value|dense)$", _MLP_4H),
    keep=KEEP_HEADS,
    dims=(
        Dims(r"\.self_attention\.dense$", "hidden_size", "hidden_size"),
        Dims(r"\.mlp\.dense_h_to_4h$", "ffn_hidden_size", "hidden_size"),
        Dims(r"\.mlp\.dense_4h_to_h$", "hidden_size", "ffn_hidden_size"),
    ),
    parts=(_WORDS, _LN_F),
)

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    linear=(r"\.self_attention\.(query_key_value|dense)$", _MLP_4H),
    keep=KEEP_HEADS,
    dims=(Dims(r"\.self_attention\.dense$", "hidden_size", "hidden_size"),),
    parts=(_WORDS, Part("embeddings' norm", ("word_embeddings_layernorm",)), _LN_F),
)

MPT = Family(
    name="mpt",
    model_types=("mpt",),
    linear=(r"\.attn\.(Wqkv|out_proj)$", r"\.ffn\.(up_proj|down_proj)$"),
    keep=KEEP_HEADS,
    dims=(Dims(r"\.attn\.out_proj$", "d_model", "d_model"),),
    parts=(_TABLE, Part("final norm", ("norm_f",))),
)

_OPT_ATTENTION = r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$"

# project_in and project_out (opt-350m) stand between the embeddings and the layers, once: they are kept as heads are.
OPT = Family(
    name="opt",
    model_types=("opt",),
    linear=(_OPT_ATTENTION, r"\.layers\.N\.(fc1|fc2)$"),
    keep=((r"(^|\.)(project_in|project_out)$", "head"), *KEEP_HEADS),
    fused=FUSED_QKV,
    dims=(
        Dims(_OPT_ATTENTION, "hidden_size", "hidden_size"),
        Dims(r"\.fc1$", "ffn_dim", "hidden_size"),
        Dims(r"\.fc2$", "hidden_size", "ffn_dim"),
    ),
    parts=(
        EMBEDDINGS,
        Part("position embeddings", ("embed_positions",)),
        # opt-350m normalises after each part, and not at the end
        Part("final norm", ("decoder.final_layer_norm",), unless=("do_layer_norm_before", (False,))),
    ),
)

XGLM = Family(
    name="xglm",
    model_types=("xglm",),
    linear=(_OPT_ATTENTION, r"\.layers\.N\.(fc1|fc2)$"),
    keep=KEEP_HEADS,
    fused=FUSED_QKV,
    dims=(
        Dims(_OPT_ATTENTION, "d_model", "d_model"),
        Dims(r"\.fc1$", "ffn_dim", "d_model"),
        Dims(r"\.fc2$", "d_model", "ffn_dim"),
    ),
    parts=(EMBEDDINGS, Part("final norm", ("layer_norm",))),
)
