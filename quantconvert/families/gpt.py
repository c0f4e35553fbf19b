"""Decoders of the years before Llama: GPT-2 and its kin, OPT, BLOOM, Falcon. Layers may stand under any prefix.

Names and shapes: transformers' model files; fused sets: vLLM's packed_modules_mapping.
"""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.common import EMBEDDINGS, FUSED_QKV, KEEP_HEADS
from quantconvert.families.folds import FC_NORMS, FC_UNFOLDED, FC_VALUES, pre_norm, under
from quantconvert.families.row import Dims, Family, Fold, Part

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
# GPT's own norms come after attention and MLP, where they are the residual too.
_GPT2_NORMS = (
    Fold("ln_1", ("attn.c_attn",), only=("gpt2", "gpt_bigcode")),
    Fold("ln_2", ("mlp.c_fc",), only=("gpt2", "gpt_bigcode")),
    Fold("ln_cross_attn", ("crossattention.q_attn",)),
)
# Keys and values of cross-attention come from an encoder.
_GPT2_UNFOLDED = (r"\.c_proj$", r"^crossattention\.c_attn$")
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
    folds=(
        *_GPT2_NORMS,
        Fold("attn.c_attn", ("attn.c_proj",), "rows"),
        Fold("crossattention.c_attn", ("crossattention.c_proj",), "rows"),
    ),
    unfolded=_GPT2_UNFOLDED,
)

# The same names, but ordinary linear layers (transformers `modeling_gpt_bigcode.py`).
GPT_BIGCODE = Family(
    name="gpt-bigcode",
    model_types=("gpt_bigcode",),
    linear=_GPT2_LINEAR,
    keep=_GPT2_KEEP,
    dims=_GPT2_DIMS,
    parts=_GPT2_PARTS,
    # Without `multi_query` query, key and value take turns, head by head
    folds=(
        *_GPT2_NORMS,
        Fold("attn.c_attn", ("attn.c_proj",), "rows", heads=True, unless=("multi_query", (False,))),
    ),
    unfolded=_GPT2_UNFOLDED,
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
    folds=(
        Fold("ln_1", under("attn.attention", "q_proj", "k_proj", "v_proj")),
        Fold("ln_2", ("mlp.c_fc",)),
        Fold("attn.attention.v_proj", ("attn.attention.out_proj",), "rows"),
    ),
    unfolded=(r"\.(out_proj|c_proj)$",),
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
    folds=(
        Fold("ln_1", (*under("attn", "q_proj", "k_proj", "v_proj"), "mlp.fc_in")),
        Fold("attn.v_proj", ("attn.out_proj",), "rows"),
    ),
    unfolded=(r"\.(out_proj|fc_out)$",),
)

# The same but for query, key and value, which are stored as one, in four parts of each in turn.
CODEGEN = Family(
    name="codegen",
    model_types=("codegen",),
    linear=(r"\.attn\.(qkv_proj|out_proj)$", r"\.mlp\.(fc_in|fc_out)$"),
    keep=KEEP_HEADS,
    dims=GPT_J.dims,
    parts=(_TABLE, _LN_F),
    folds=(Fold("ln_1", ("attn.qkv_proj", "mlp.fc_in")),),
    unfolded=GPT_J.unfolded,
)

# Where query, key and value are one and take turns head by head, the values' rows are not the last ones.
_DENSE = (r"\.(dense|dense_4h_to_h)$",)
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
    folds=pre_norm("mlp.dense_h_to_4h", attention=("attention.query_key_value",)),
    unfolded=_DENSE,
)

PERSIMMON = Family(
    name="persimmon",
    model_types=("persimmon",),
    linear=(r"\.self_attn\.(query_key_value|dense)$", _MLP_4H),
    keep=KEEP_HEADS,
    dims=(Dims(r"\.self_attn\.dense$", "hidden_size", "hidden_size"), *GPT_NEOX.dims[1:]),
    parts=(EMBEDDINGS, Part("final norm", ("final_layernorm",))),
    folds=pre_norm("mlp.dense_h_to_4h", attention=("self_attn.query_key_value",)),
    unfolded=_DENSE,
)

_FALCON_SERIAL = ("parallel_attn", (False,))

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
    folds=(
        # One norm before attention and MLP, one before each of them, or one before and one between
        Fold("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h"), unless=_FALCON_SERIAL),
        Fold("ln_attn", ("self_attention.query_key_value",)),
        Fold("ln_mlp", ("mlp.dense_h_to_4h",)),
        Fold("input_layernorm", ("self_attention.query_key_value",), where=_FALCON_SERIAL),
        Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), where=_FALCON_SERIAL),
        # With one key-value head for all, its values are the last rows
        Fold(
            "self_attention.query_key_value",
            ("self_attention.dense",),
            "rows",
            heads=True,
            where=("new_decoder_architecture", (None, False)),
            unless=("multi_query", (False,)),
        ),
    ),
    unfolded=_DENSE,
)

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    linear=(r"\.self_attention\.(query_key_value|dense)$", _MLP_4H),
    keep=KEEP_HEADS,
    dims=(Dims(r"\.self_attention\.dense$", "hidden_size", "hidden_size"),),
    parts=(_WORDS, Part("embeddings' norm", ("word_embeddings_layernorm",)), _LN_F),
    folds=tuple(
        replace(fold, unless=("apply_residual_connection_post_layernorm", (True,)))
        for fold in pre_norm("mlp.dense_h_to_4h", attention=("self_attention.query_key_value",))
    ),
    unfolded=_DENSE,
)

MPT = Family(
    name="mpt",
    model_types=("mpt",),
    linear=(r"\.attn\.(Wqkv|out_proj)$", r"\.ffn\.(up_proj|down_proj)$"),
    keep=KEEP_HEADS,
    dims=(Dims(r"\.attn\.out_proj$", "d_model", "d_model"),),
    parts=(_TABLE, Part("final norm", ("norm_f",))),
    folds=(
        Fold("norm_1", ("attn.Wqkv",)),
        Fold("norm_2", ("ffn.up_proj",)),
        Fold("attn.Wqkv", ("attn.out_proj",), "rows", where=("attn_config.clip_qkv", (None, 0))),
    ),
    unfolded=(r"\.(out_proj|down_proj)$",),
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
    folds=(*(replace(fold, unless=("do_layer_norm_before", (False,))) for fold in FC_NORMS), *FC_VALUES),
    unfolded=FC_UNFOLDED,
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
    folds=(*FC_NORMS, *FC_VALUES),
    unfolded=FC_UNFOLDED,
)
