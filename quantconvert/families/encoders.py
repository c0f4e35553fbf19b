"""Encoders. Names and shapes: transformers' model files; fused sets: vLLM's `bert.py` and `bert_with_rope.py`.

Checkpoints of the bare encoder have its names without a prefix, those with a head have `bert.` and the like before
them. Heads are kept: classifiers are small, and what a masked language model ends in is tied to the embeddings.
"""

from __future__ import annotations

from quantconvert.families.common import (
    DECODER_PARTS,
    FUSED_COMMON,
    FUSED_QKV,
    LINEAR_ATTENTION,
    LINEAR_MLP,
)
from quantconvert.families.folds import FOLD_UP, FOLD_V, OUTS, pre_norm
from quantconvert.families.row import Dims, Family, Fold, FusedSet, Part, Reason

_HEADS: tuple[tuple[str, Reason], ...] = (
    (r"(^|\.)lm_head(\.(dense|decoder))?$", "lm_head"),
    (r"^cls\.(predictions\.(transform\.dense|decoder)|seq_relationship)$", "head"),
    (r"^(\w+\.)?pooler(\.dense)?$", "head"),
    (r"^(classifier(\.(dense|out_proj))?|qa_outputs|score)$", "head"),
)
_MASKED = "cls.predictions.decoder"
_LAYER_DIMS = (
    Dims(r"\.intermediate\.dense$", "intermediate_size", "hidden_size"),
    Dims(r"(?<!attention)\.output\.dense$", "hidden_size", "intermediate_size"),
    Dims(r"attention\.output\.dense$", "hidden_size", "hidden_size"),
)

# What BERT's norms give is the residual too, so that no norm is in these folds but ModernBERT's and EuroBERT's.


def _values(value: str, output: str) -> Fold:
    return Fold(value, (output,), "rows")


_WORDS = Part("embeddings", ("embeddings.word_embeddings",))
_POSITIONS = Part("position embeddings", ("embeddings.position_embeddings",))
_NORM = Part("embeddings' norm", ("embeddings.LayerNorm",))

BERT = Family(
    name="bert",
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "rembert"),
    linear=(
        r"\.(attention|crossattention)\.(self\.(query|key|value)|output\.dense)$",
        r"\.layer\.N\.(intermediate|output)\.dense$",
    ),
    keep=(
        *_HEADS,
        # Electra: its embeddings are narrower than its layers, and it has heads of its own
        (r"(^|\.)embeddings_project$", "head"),
        # RemBERT: the same under other names
        (r"(^|\.)embedding_hidden_mapping_in$|^cls\.predictions\.dense$", "head"),
        (r"^(discriminator_predictions|generator_predictions)\.(dense|dense_prediction)$", "head"),
        (r"^(generator_lm_head|sequence_summary\.summary)$", "head"),
    ),
    fused=(FusedSet("qkv_proj", ("query", "key", "value")),),
    dims=(*_LAYER_DIMS, Dims(r"attention\.self\.(query|key|value)$", "hidden_size", "hidden_size")),
    tied=(_MASKED, "lm_head.decoder", "generator_lm_head"),
    parts=(_WORDS, _POSITIONS, _NORM),
    folds=tuple(_values(f"{stem}.self.value", f"{stem}.output.dense") for stem in ("attention", "crossattention")),
)

MPNET = Family(
    name="mpnet",
    model_types=("mpnet",),
    linear=(r"\.attention\.attn\.[qkvo]$", r"\.layer\.N\.(intermediate|output)\.dense$"),
    keep=_HEADS,
    dims=(*_LAYER_DIMS, Dims(r"\.attention\.attn\.[qkvo]$", "hidden_size", "hidden_size")),
    tied=("lm_head.decoder",),
    parts=(_WORDS, _POSITIONS, _NORM),
    folds=(_values("attention.attn.v", "attention.attn.o"),),
)

_DISTILBERT_ATTENTION = r"\.attention\.(q_lin|k_lin|v_lin|out_lin)$"

DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    linear=(_DISTILBERT_ATTENTION, r"\.ffn\.(lin1|lin2)$"),
    keep=((r"^(vocab_transform|vocab_projector|pre_classifier)$", "head"), *_HEADS),
    dims=(
        Dims(_DISTILBERT_ATTENTION, "dim", "dim"),
        Dims(r"\.ffn\.lin1$", "hidden_dim", "dim"),
        Dims(r"\.ffn\.lin2$", "dim", "hidden_dim"),
    ),
    tied=("vocab_projector",),
    parts=(_WORDS, _POSITIONS, _NORM),
    folds=(_values("attention.v_lin", "attention.out_lin"),),
)

# in_proj, pos_proj and pos_q_proj are DeBERTa's of the first version; both versions multiply relative positions.
_DEBERTA_ATTENTION = r"\.attention\.self\.(query_proj|key_proj|value_proj|pos_key_proj|pos_query_proj)$"

DEBERTA = Family(
    name="deberta",
    model_types=("deberta", "deberta-v2"),
    linear=(
        _DEBERTA_ATTENTION,
        r"\.attention\.self\.(in_proj|pos_proj|pos_q_proj)$",
        r"\.attention\.output\.dense$",
        r"\.layer\.N\.(intermediate|output)\.dense$",
    ),
    keep=(
        (r"(^|\.)embed_proj$", "head"),
        (r"^(lm_predictions\.lm_head\.dense|mask_predictions\.(dense|classifier))$", "head"),
        *_HEADS,
    ),
    dims=(*_LAYER_DIMS, Dims(_DEBERTA_ATTENTION, "hidden_size", "hidden_size")),
    tied=(_MASKED,),
    parts=(_WORDS, _NORM),
    # In the first version's in_proj query, key and value take turns head by head
    folds=(_values("attention.self.value_proj", "attention.output.dense"),),
)

# One layer serves every depth (transformers `modeling_albert.py`): its tensors are few, their error is repeated.
ALBERT = Family(
    name="albert",
    model_types=("albert",),
    linear=(r"\.albert_layers\.N\.(attention\.(query|key|value|dense)|ffn|ffn_output)$",),
    keep=(
        *_HEADS,
        (r"(^|\.)embedding_hidden_mapping_in$", "head"),
        (r"^(predictions\.(dense|decoder)|sop_classifier\.classifier)$", "head"),
    ),
    fused=(FusedSet("qkv_proj", ("query", "key", "value")),),
    dims=(
        Dims(r"\.attention\.(query|key|value|dense)$", "hidden_size", "hidden_size"),
        Dims(r"\.ffn$", "intermediate_size", "hidden_size"),
        Dims(r"\.ffn_output$", "hidden_size", "intermediate_size"),
    ),
    tied=("predictions.decoder",),
    parts=(_WORDS, _POSITIONS, _NORM, Part("embeddings' projection", ("encoder.embedding_hidden_mapping_in",))),
    folds=(_values("attention.value", "attention.dense"),),
)

# Wqkv and Wi (gate and up) are stored fused; the decoder of the same design stores query, key and value apart.
MODERNBERT = Family(
    name="modernbert",
    model_types=("modernbert", "modernbert-decoder"),
    linear=(r"\.attn\.(Wqkv|q_proj|k_proj|v_proj|Wo)$", r"\.mlp\.(Wi|Wo)$"),
    keep=((r"^(head\.dense|decoder)$", "head"), *_HEADS),
    fused=FUSED_QKV,
    dims=(
        Dims(r"\.attn\.Wo$", "hidden_size", "hidden_size"),
        Dims(r"\.mlp\.Wo$", "hidden_size", "intermediate_size"),
    ),
    tied=("decoder",),
    parts=(
        Part("embeddings", ("embeddings.tok_embeddings",)),
        Part("embeddings' norm", ("embeddings.norm",)),
        Part("final norm", ("final_norm",)),
    ),
    uneven=(r"^attn_norm\.",),  # the embeddings' norm stands before the first layer
    # The first half of Wi goes through the activation
    folds=(
        Fold("attn_norm", ("attn.Wqkv", "attn.q_proj", "attn.k_proj", "attn.v_proj")),
        Fold("mlp_norm", ("mlp.Wi",)),
        _values("attn.Wqkv", "attn.Wo"),
        _values("attn.v_proj", "attn.Wo"),
        _values("mlp.Wi", "mlp.Wo"),
    ),
    unfolded=(r"\.Wo$", r"^attn\.(Wqkv|q_proj|k_proj|v_proj)$"),
)

# vLLM joins fc12 and fc11 as gate_up_proj (`bert_with_rope.py`). Remote code's config has GPT-2's keys.
NOMIC_BERT = Family(
    name="nomic-bert",
    model_types=("nomic_bert",),
    linear=(r"\.attn\.(Wqkv|out_proj)$", r"\.mlp\.(fc11|fc12|fc1|fc2)$"),
    keep=_HEADS,
    fused=(FusedSet("gate_up_proj", ("fc12", "fc11")),),
    dims=(
        Dims(r"\.mlp\.(fc11|fc12|fc1)$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.fc2$", "hidden_size", "intermediate_size"),
        Dims(r"\.mlp\.(fc11|fc12|fc1)$", "n_inner", "n_embd"),
        Dims(r"\.mlp\.fc2$", "n_embd", "n_inner"),
    ),
    tied=(_MASKED,),
    parts=(_WORDS, Part("embeddings' norm", ("emb_ln", "embeddings.LayerNorm"))),
    folds=(_values("attn.Wqkv", "attn.out_proj"), _values("mlp.fc11", "mlp.fc2")),
)

EUROBERT = Family(
    name="eurobert",
    model_types=("eurobert",),
    linear=(LINEAR_ATTENTION, LINEAR_MLP),
    keep=((r"^dense$", "head"), *_HEADS),
    fused=FUSED_COMMON,
    dims=(
        Dims(r"\.mlp\.(gate_proj|up_proj)$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.down_proj$", "hidden_size", "intermediate_size"),
    ),
    parts=DECODER_PARTS,
    folds=(*pre_norm(), FOLD_V, FOLD_UP),
    unfolded=OUTS,
)

# The text half of CLIP, which pipelines read prompts with.
CLIP_TEXT = Family(
    name="clip-text",
    model_types=("clip_text_model",),
    linear=(r"\.layers\.N\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$", r"\.layers\.N\.mlp\.(fc1|fc2)$"),
    keep=((r"^text_projection$", "head"), *_HEADS),
    fused=FUSED_QKV,
    dims=(
        Dims(r"\.mlp\.fc1$", "intermediate_size", "hidden_size"),
        Dims(r"\.mlp\.fc2$", "hidden_size", "intermediate_size"),
    ),
    parts=(
        Part("embeddings", ("token_embedding",)),
        Part("position embeddings", ("position_embedding",)),
        Part("final norm", ("final_layer_norm",)),
    ),
)

# Its layers are QuantLinear, which quantize themselves and are no `Linear` (transformers `quant_modules.py`): no engine
# reads anything else in their place.
IBERT = Family(
    name="ibert",
    model_types=("ibert",),
    linear=(),
    keep=(
        (r"\.layer\.N\.(attention\.(self\.(query|key|value)|output\.dense)|(intermediate|output)\.dense)$", "family"),
        *_HEADS,
    ),
    parts=(_WORDS, _POSITIONS, _NORM),
)
