"""Encoder-decoders: T5, BART, Whisper and their kin. Names and shapes: transformers' model files."""

from __future__ import annotations

from quantconvert.families.common import FUSED_QKV
from quantconvert.families.folds import FC_NORMS, FC_UNFOLDED, FC_VALUES, gated, only, under
from quantconvert.families.row import Dims, Family, Fold, FusedSet, Part, Reason

_SHARED: tuple[str, Reason] = (r"(^|\.)shared$", "embedding")
_HEADS: tuple[tuple[str, Reason], ...] = (
    (r"(^|\.)(lm_head|proj_out)$", "lm_head"),
    (r"^(classification_head\.(dense|out_proj)|classifier|projector|qa_outputs)$", "head"),
)
_TABLE = Part("embeddings", ("shared", "embed_tokens"))
_WHOLE = "ForConditionalGeneration"

# No engine but transformers runs T5, so that nothing is fused.
T5 = Family(
    name="t5",
    model_types=("t5", "mt5", "umt5"),
    linear=(r"\.(SelfAttention|EncDecAttention)\.[qkvo]$", r"\.DenseReluDense\.(wi|wi_0|wi_1|wo)$"),
    keep=(_SHARED, (r"\.relative_attention_bias$", "embedding"), *_HEADS),
    dims=(
        Dims(r"\.DenseReluDense\.(wi|wi_0|wi_1)$", "d_ff", "d_model"),
        Dims(r"\.DenseReluDense\.wo$", "d_model", "d_ff"),
    ),
    parts=(
        _TABLE,
        Part("encoder's final norm", ("encoder.final_layer_norm",), only=_WHOLE),
        Part("decoder's final norm", ("decoder.final_layer_norm",), only=_WHOLE),
    ),
    # Each part of a layer has its own norm. Keys and values of cross-attention come from the encoder
    folds=(
        Fold(
            "layer.N.layer_norm",
            (
                *under("layer.N.SelfAttention", "q", "k", "v"),
                "layer.N.EncDecAttention.q",
                *under("layer.N.DenseReluDense", "wi", "wi_0", "wi_1"),
            ),
        ),
        Fold("layer.N.SelfAttention.v", ("layer.N.SelfAttention.o",), "rows"),
        Fold("layer.N.EncDecAttention.v", ("layer.N.EncDecAttention.o",), "rows"),
        *gated("layer.N.DenseReluDense", up="wi_1", down="wo"),
    ),
    unfolded=(r"\.(o|wo)$", r"\.EncDecAttention\.[kv]$"),
)

_ATTENTION = r"\.(self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)$"
_DIMS = (
    Dims(_ATTENTION, "d_model", "d_model"),
    Dims(r"(^|\.)encoder\.layers\.N\.fc1$", "encoder_ffn_dim", "d_model"),
    Dims(r"(^|\.)encoder\.layers\.N\.fc2$", "d_model", "encoder_ffn_dim"),
    Dims(r"(^|\.)decoder\.layers\.N\.fc1$", "decoder_ffn_dim", "d_model"),
    Dims(r"(^|\.)decoder\.layers\.N\.fc2$", "d_model", "decoder_ffn_dim"),
)
# In cross-attention only key and value are one layer (vLLM `whisper.py`).
_FUSED = (*FUSED_QKV, FusedSet("kv_proj", ("k_proj", "v_proj")))

BART = Family(
    name="bart",
    model_types=("bart", "mbart", "marian", "pegasus", "m2m_100"),
    linear=(_ATTENTION, r"\.layers\.N\.(fc1|fc2)$"),
    keep=(_SHARED, *_HEADS),
    fused=_FUSED,
    dims=_DIMS,
    parts=(
        _TABLE,
        Part("encoder's final norm", ("encoder.layer_norm",), ("model_type", ("bart", "marian")), _WHOLE),
        Part("decoder's final norm", ("decoder.layer_norm",), ("model_type", ("bart", "marian")), _WHOLE),
    ),
    folds=(*only(("mbart", "pegasus", "m2m_100"), *FC_NORMS), *FC_VALUES),  # those of the others are the residual too
    unfolded=FC_UNFOLDED,
)

# What hears is the model itself and no tower: the encoder is quantized too.
WHISPER = Family(
    name="whisper",
    model_types=("whisper",),
    linear=(_ATTENTION, r"\.layers\.N\.(fc1|fc2)$"),
    keep=_HEADS,
    fused=_FUSED,
    dims=_DIMS,
    tied=("proj_out",),
    parts=(
        Part("embeddings", ("decoder.embed_tokens",), only=_WHOLE),
        Part("convolutions", ("encoder.conv1",), only=_WHOLE),
        Part("convolutions", ("encoder.conv2",), only=_WHOLE),
        Part("position embeddings", ("decoder.embed_positions",), only=_WHOLE),
        Part("encoder's final norm", ("encoder.layer_norm",), only=_WHOLE),
        Part("decoder's final norm", ("decoder.layer_norm",), only=_WHOLE),
    ),
    folds=(*FC_NORMS, *FC_VALUES),
    unfolded=FC_UNFOLDED,
)
