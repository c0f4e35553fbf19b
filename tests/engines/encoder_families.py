"""Encoders and encoder-decoders: tiny models of transformers' own making, and what of each is quantized."""

from __future__ import annotations

from typing import Any, Literal

from tests.engines.families import Case, each

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DISTILBERT: dict[str, Any] = {
    "vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
                      "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WHISPER = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32,
}  # fmt: skip
DEQUANTIZED: Literal["with dequantize"] = "with dequantize"
SOUND: dict[str, tuple[int, ...]] = {"input_features": (2, 8, 64)}


def embedded(stem: str, *names: str) -> dict[str, str]:
    return {f"{stem}.{name}.weight": "embedding" for name in names}


def heads(*names: str, reason: str = "head") -> dict[str, str]:
    return {f"{name}.weight": reason for name in names}


def bert(stem: str) -> tuple[str, ...]:
    return each(f"{stem}.layer.N", "attention.self.query", "attention.self.key", "attention.self.value",
                "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip


def mpnet(stem: str) -> tuple[str, ...]:
    return each(f"{stem}.layer.N", *each("attention.attn", *"qkvo"), "intermediate.dense", "output.dense")


def deberta(*attention: str) -> tuple[str, ...]:
    return each("deberta.encoder.layer.N", *each("attention.self", *attention), "attention.output.dense",
                "intermediate.dense", "output.dense")  # fmt: skip


def albert(stem: str) -> tuple[str, ...]:
    return each(f"{stem}.albert_layer_groups.N.albert_layers.N", "attention.query", "attention.key", "attention.value",
                "attention.dense", "ffn", "ffn_output")  # fmt: skip


def t5(stem: str, *dense: str) -> tuple[str, ...]:
    names = (*each("SelfAttention", *"qkvo"), *each("DenseReluDense", *dense, "wo"))
    return each(f"{stem}.block.N.layer.N", *names)


def t5_pair(*dense: str, root: str = "") -> tuple[str, ...]:
    cross = each(f"{root}decoder.block.N.layer.N.EncDecAttention", *"qkvo")
    return t5(f"{root}encoder", *dense) + t5(f"{root}decoder", *dense) + cross


def t5_kept(*stacks: str, shared: str = "shared") -> dict[str, str]:
    bias = "block.N.layer.N.SelfAttention.relative_attention_bias"
    return heads(shared, *(f"{stack}.{bias}" for stack in stacks), reason="embedding")


def bart(stem: str, *attention: str) -> tuple[str, ...]:
    names = (name for kind in attention for name in each(kind, "q_proj", "k_proj", "v_proj", "out_proj"))
    return each(f"{stem}.layers.N", *names, "fc1", "fc2")


BART_PAIR = bart("model.encoder", "self_attn") + bart("model.decoder", "self_attn", "encoder_attn")
BART_KEPT = heads("model.shared", "model.encoder.embed_positions", "model.decoder.embed_positions", reason="embedding")
LOGITS_BIAS = {"final_logits_bias": "not a weight"}
DISTILBERT_LAYER = each("distilbert.transformer.layer.N", "attention.q_lin", "attention.k_lin", "attention.v_lin",
                        "attention.out_lin", "ffn.lin1", "ffn.lin2")  # fmt: skip
MODERNBERT = each("model.layers.N", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
BERT_EMBEDDED = ("word_embeddings", "position_embeddings", "token_type_embeddings")
ELECTRA = embedded("electra.embeddings", *BERT_EMBEDDED) | heads("electra.embeddings_project")
DEBERTA_EMBEDDED = embedded("deberta.embeddings", "word_embeddings", "position_embeddings") | heads(
    "deberta.encoder.rel_embeddings", reason="embedding"
)
RELATIVE = SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

CASES = {
    "bert bare": Case("BertModel", SIZES, bert("encoder"),
                      embedded("embeddings", *BERT_EMBEDDED) | heads("pooler.dense")),
    "bert": Case("BertForPreTraining", SIZES, bert("bert.encoder"),
                 embedded("bert.embeddings", *BERT_EMBEDDED)
                 | heads("bert.pooler.dense", "cls.predictions.transform.dense", "cls.seq_relationship")),
    "bert classifier": Case("BertForSequenceClassification", SIZES, bert("bert.encoder"),
                            embedded("bert.embeddings", *BERT_EMBEDDED) | heads("bert.pooler.dense", "classifier")),
    "bert decoder": Case("BertLMHeadModel", SIZES | {"is_decoder": True}, bert("bert.encoder"),
                         embedded("bert.embeddings", *BERT_EMBEDDED) | heads("cls.predictions.transform.dense")),
    "roberta": Case("RobertaForMaskedLM", SIZES, bert("roberta.encoder"),
                    embedded("roberta.embeddings", *BERT_EMBEDDED) | heads("lm_head.dense", reason="lm_head")),
    "xlm-roberta": Case("XLMRobertaForSequenceClassification", SIZES, bert("roberta.encoder"),
                        embedded("roberta.embeddings", *BERT_EMBEDDED)
                        | heads("classifier.dense", "classifier.out_proj")),
    "camembert": Case("CamembertForMaskedLM", SIZES, bert("roberta.encoder"),
                      embedded("roberta.embeddings", *BERT_EMBEDDED) | heads("lm_head.dense", reason="lm_head")),
    "mpnet bare": Case("MPNetModel", SIZES, mpnet("encoder"),
                       embedded("embeddings", *BERT_EMBEDDED[:2]) | heads("pooler.dense")
                       | embedded("encoder", "relative_attention_bias")),
    "mpnet": Case("MPNetForMaskedLM", SIZES, mpnet("mpnet.encoder"),
                  embedded("mpnet.embeddings", *BERT_EMBEDDED[:2]) | heads("lm_head.dense", reason="lm_head")
                  | embedded("mpnet.encoder", "relative_attention_bias")),
    "distilbert": Case("DistilBertForMaskedLM", DISTILBERT, DISTILBERT_LAYER,
                       embedded("distilbert.embeddings", *BERT_EMBEDDED[:2]) | heads("vocab_transform")),
    "distilbert classifier": Case("DistilBertForSequenceClassification", DISTILBERT, DISTILBERT_LAYER,
                                  embedded("distilbert.embeddings", *BERT_EMBEDDED[:2])
                                  | heads("pre_classifier", "classifier")),
    "electra": Case("ElectraForPreTraining", SIZES | {"embedding_size": 32}, bert("electra.encoder"),
                    ELECTRA | heads("discriminator_predictions.dense", "discriminator_predictions.dense_prediction")),
    "electra generator": Case("ElectraForMaskedLM", SIZES | {"embedding_size": 32}, bert("electra.encoder"),
                              ELECTRA | heads("generator_predictions.dense")),
    "rembert": Case("RemBertForMaskedLM", SIZES | {"input_embedding_size": 32, "output_embedding_size": 48},
                    bert("rembert.encoder"),
                    embedded("rembert.embeddings", *BERT_EMBEDDED)
                    | heads("rembert.encoder.embedding_hidden_mapping_in", "cls.predictions.dense",
                            "cls.predictions.decoder")),
    "deberta": Case("DebertaForSequenceClassification", RELATIVE | {"max_relative_positions": 16},
                    deberta("in_proj", "pos_proj", "pos_q_proj"),
                    DEBERTA_EMBEDDED | heads("pooler.dense", "classifier")),
    "deberta-v2": Case("DebertaV2ForSequenceClassification", RELATIVE | {"position_buckets": 16},
                       deberta("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"),
                       DEBERTA_EMBEDDED | heads("pooler.dense", "classifier")),
    "deberta-v3": Case("DebertaV2ForMaskedLM",
                       RELATIVE | {"position_buckets": 16, "share_att_key": True, "conv_kernel_size": 3},
                       deberta("query_proj", "key_proj", "value_proj"),
                       DEBERTA_EMBEDDED | heads("cls.predictions.transform.dense")
                       | heads("deberta.encoder.conv.conv", reason="conv")),
    "albert": Case("AlbertForMaskedLM", SIZES | {"embedding_size": 32}, albert("albert.encoder"),
                   embedded("albert.embeddings", *BERT_EMBEDDED)
                   | heads("albert.encoder.embedding_hidden_mapping_in", "predictions.dense")),
    "modernbert": Case("ModernBertForMaskedLM", SIZES, MODERNBERT,
                       embedded("model.embeddings", "tok_embeddings") | heads("head.dense"), loads=DEQUANTIZED),
    "modernbert classifier": Case("ModernBertForSequenceClassification", SIZES, MODERNBERT,
                                  embedded("model.embeddings", "tok_embeddings") | heads("head.dense", "classifier"),
                                  loads=DEQUANTIZED),
    "modernbert-decoder": Case("ModernBertDecoderForCausalLM", SIZES,
                               each("model.layers.N", *each("attn", "q_proj", "k_proj", "v_proj", "Wo"), "mlp.Wi",
                                    "mlp.Wo"),
                               embedded("model.embeddings", "tok_embeddings")
                               | heads("lm_head.dense", reason="lm_head"), loads=DEQUANTIZED),
    "eurobert": Case("EuroBertForMaskedLM", SIZES | {"num_key_value_heads": 2},
                     each("model.layers.N.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
                     + each("model.layers.N.mlp", "gate_proj", "up_proj", "down_proj"),
                     embedded("model", "embed_tokens") | heads("lm_head", reason="lm_head")),
    "nomic_bert": Case("NomicBertModel", SIZES,
                       each("encoder.layers.N", "attn.Wqkv", "attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2"),
                       embedded("embeddings", "word_embeddings", "token_type_embeddings"), loads="never"),
    "t5": Case("T5ForConditionalGeneration", T5, t5_pair("wi"), t5_kept("encoder", "decoder"), loads=DEQUANTIZED),
    "t5 gated": Case("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, t5_pair("wi_0", "wi_1"),
                     t5_kept("encoder", "decoder"), loads=DEQUANTIZED),
    "t5 encoder": Case("T5EncoderModel", T5, t5("encoder", "wi"), t5_kept("encoder"), loads=DEQUANTIZED),
    "t5 classifier": Case("T5ForSequenceClassification", T5, t5_pair("wi", root="transformer."),
                          t5_kept("transformer.encoder", "transformer.decoder", shared="transformer.shared")
                          | heads("classification_head.dense", "classification_head.out_proj"), loads=DEQUANTIZED),
    "mt5": Case("MT5ForConditionalGeneration", T5, t5_pair("wi_0", "wi_1"), t5_kept("encoder", "decoder"),
                loads=DEQUANTIZED),
    "umt5": Case("UMT5ForConditionalGeneration", T5, t5_pair("wi_0", "wi_1"), t5_kept("encoder", "decoder"),
                 loads=DEQUANTIZED),
    "bart": Case("BartForConditionalGeneration", BART, BART_PAIR, BART_KEPT | LOGITS_BIAS),
    "bart classifier": Case("BartForSequenceClassification", BART, BART_PAIR,
                            BART_KEPT | heads("classification_head.dense", "classification_head.out_proj")),
    "mbart": Case("MBartForConditionalGeneration", BART, BART_PAIR, BART_KEPT | LOGITS_BIAS),
    "marian": Case("MarianMTModel", BART, BART_PAIR, heads("model.shared", reason="embedding") | LOGITS_BIAS),
    "pegasus": Case("PegasusForConditionalGeneration", BART, BART_PAIR,
                    BART_KEPT | LOGITS_BIAS),
    "m2m_100": Case("M2M100ForConditionalGeneration", BART, BART_PAIR, heads("model.shared", reason="embedding")),
    "whisper": Case("WhisperForConditionalGeneration", WHISPER, BART_PAIR,
                    heads("model.decoder.embed_tokens", "model.decoder.embed_positions",
                          "model.encoder.embed_positions", reason="embedding")
                    | heads("model.encoder.conv1", "model.encoder.conv2", reason="conv"), inputs=SOUND),
    "whisper classifier": Case("WhisperForAudioClassification", WHISPER, bart("encoder", "self_attn"),
                               heads("encoder.embed_positions", reason="embedding")
                               | heads("encoder.conv1", "encoder.conv2", reason="conv")
                               | heads("projector", "classifier"), inputs=SOUND),
}  # fmt: skip
