"""Decoders without experts: tiny models of transformers' own making, and what of each is quantized."""

from __future__ import annotations

from typing import Any

from tests.engines.families import Case, each

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 32}
OLD: dict[str, Any] = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
                       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

EMBEDDED = {"model.embed_tokens.weight": "embedding"}
UNTIED = EMBEDDED | {"lm_head.weight": "lm_head"}
QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = each("model.layers.N.self_attn", *QKV, "o_proj")
LLAMA = ATTENTION + each("model.layers.N.mlp", "gate_proj", "up_proj", "down_proj")
UNGATED = ATTENTION + each("model.layers.N.mlp", "up_proj", "down_proj")
FUSED_MLP = each("model.layers.N.mlp", "gate_up_proj", "down_proj")
FC = each("model.layers.N.mlp", "fc1", "fc2")


def h4(stem: str, attention: str) -> tuple[str, ...]:
    return each(f"{stem}.{attention}", "query_key_value", "dense") + each(
        f"{stem}.mlp", "dense_h_to_4h", "dense_4h_to_h"
    )


def old(attention: str, *names: str, mlp: tuple[str, str] = ("c_fc", "c_proj")) -> tuple[str, ...]:
    return each(f"transformer.h.N.{attention}", *names) + each("transformer.h.N.mlp", *mlp)


def mamba(*kept: str) -> dict[str, str]:
    mixer = "backbone.layers.N.mixer"
    found = {"backbone.embeddings.weight": "embedding", f"{mixer}.conv1d.weight": "conv"}
    return found | {f"{mixer}.{name}": "state-space" for name in kept}


OLD_EMBEDDED = {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"}
GPT_J = {"transformer.wte.weight": "embedding", "lm_head.weight": "lm_head"}
WORDS = {"transformer.word_embeddings.weight": "embedding"}
OPT_LAYER = each("model.decoder.layers.N", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                 "self_attn.out_proj", "fc1", "fc2")  # fmt: skip
STATE = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
QK_NORM = {f"model.layers.N.self_attn.{name}.weight": "norm" for name in ("q_norm", "k_norm")}

LATENT = SIZES | {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16,
                  "qk_nope_head_dim": 32, "v_head_dim": 32}  # fmt: skip
MLA_LAYER = each("model.layers.N.self_attn", "q_b_proj", "o_proj") + each(
    "model.layers.N.mlp", "gate_proj", "up_proj", "down_proj"
)
MLA_KEPT = {
    f"model.layers.N.self_attn.{name}.weight": "family" for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
}
SHORT = {"layer_types": ["conv", "full_attention"]}
GEMMA3N = {
    f"model.layers.N.{name}.weight": "family"
    for name in (
        "altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router", "laurel.linear_left",
        "laurel.linear_right", "per_layer_input_gate", "per_layer_projection",
    )
} | {
    f"model.{name}.weight": "head"
    for name in ("per_layer_model_projection", "altup_projections.N", "altup_unembed_projections.N")
} | {"model.embed_tokens_per_layer.weight": "embedding"}  # fmt: skip


def short(out: str) -> tuple[str, ...]:
    """Liquid's layers: a short convolution between projections, or attention."""
    return each("model.layers.N", *(f"self_attn.{name}" for name in QKV), out, "conv.in_proj", "conv.out_proj",
                "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")  # fmt: skip


CASES = {
    "llama": Case("LlamaForCausalLM", GROUPED, LLAMA, UNTIED),
    "llama tied": Case("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, LLAMA, EMBEDDED),
    "llama biases": Case("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}, LLAMA, UNTIED),
    "llama reward": Case("LlamaForSequenceClassification", GROUPED, LLAMA, EMBEDDED | {"score.weight": "head"}),
    "mistral": Case("MistralForCausalLM", GROUPED, LLAMA, UNTIED),
    "ministral3": Case("Ministral3ForCausalLM", WIDE_HEADS, LLAMA, UNTIED),
    "qwen2": Case("Qwen2ForCausalLM", GROUPED, LLAMA, UNTIED),
    "qwen3": Case("Qwen3ForCausalLM", WIDE_HEADS, LLAMA, UNTIED),
    "gemma": Case("GemmaForCausalLM", WIDE_HEADS, LLAMA, EMBEDDED),
    "gemma2": Case("Gemma2ForCausalLM", WIDE_HEADS, LLAMA, EMBEDDED),
    "gemma3": Case("Gemma3ForCausalLM", WIDE_HEADS, LLAMA, EMBEDDED),
    "granite": Case("GraniteForCausalLM", GROUPED, LLAMA, UNTIED),
    "smollm3": Case("SmolLM3ForCausalLM", GROUPED, LLAMA, EMBEDDED),
    "seed_oss": Case("SeedOssForCausalLM", WIDE_HEADS, LLAMA, UNTIED),
    "exaone4": Case("Exaone4ForCausalLM", GROUPED, LLAMA, UNTIED),
    "olmo": Case("OlmoForCausalLM", GROUPED, LLAMA, UNTIED),
    "olmo2": Case("Olmo2ForCausalLM", GROUPED, LLAMA, UNTIED),
    "olmo3": Case("Olmo3ForCausalLM", GROUPED, LLAMA, UNTIED),
    "stablelm": Case("StableLmForCausalLM", GROUPED | {"qk_layernorm": True}, LLAMA, UNTIED),
    "cohere": Case("CohereForCausalLM", GROUPED | {"use_qk_norm": True}, LLAMA, EMBEDDED | QK_NORM),
    "cohere2": Case("Cohere2ForCausalLM", GROUPED, LLAMA, EMBEDDED),
    "helium": Case("HeliumForCausalLM", GROUPED | {"head_dim": 16}, LLAMA, UNTIED),
    "hunyuan_v1_dense": Case("HunYuanDenseV1ForCausalLM", WIDE_HEADS, LLAMA, UNTIED),
    "ernie4_5": Case("Ernie4_5ForCausalLM", WIDE_HEADS, LLAMA, EMBEDDED),
    "cwm": Case("CwmForCausalLM", WIDE_HEADS, LLAMA, UNTIED),
    "vaultgemma": Case("VaultGemmaForCausalLM", WIDE_HEADS, LLAMA, EMBEDDED),
    "nemotron": Case("NemotronForCausalLM", GROUPED, UNGATED, UNTIED),
    "arcee": Case("ArceeForCausalLM", GROUPED, UNGATED, UNTIED),
    "apertus": Case("ApertusForCausalLM", GROUPED, UNGATED, UNTIED),
    "jais2": Case("Jais2ForCausalLM", GROUPED | {"head_dim": 16}, UNGATED, UNTIED),
    "minicpm3": Case("MiniCPM3ForCausalLM", LATENT, MLA_LAYER, EMBEDDED | MLA_KEPT),
    "youtu": Case("YoutuForCausalLM", LATENT, MLA_LAYER, EMBEDDED | MLA_KEPT),
    "lfm2": Case("Lfm2ForCausalLM", GROUPED | SHORT, short("self_attn.out_proj"),
                 EMBEDDED | {"model.layers.N.conv.conv.weight": "conv"}),
    "lfm3": Case("Lfm3ForCausalLM", GROUPED | SHORT | {"num_attention_heads": 8},
                 (*short("self_attn.o_proj"), "model.layers.N.self_attn.gate_proj"),
                 EMBEDDED | {"model.layers.N.conv.conv.weight": "conv"}),
    "gemma3n": Case("Gemma3nForCausalLM",
                    WIDE_HEADS | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
                                  "vocab_size_per_layer_input": 96, "layer_types": ["full_attention"] * 2,
                                  "activation_sparsity_pattern": [0.0, 0.0]},
                    LLAMA, EMBEDDED | GEMMA3N),
    "phi3": Case("Phi3ForCausalLM", GROUPED,
                 each("model.layers.N.self_attn", "qkv_proj", "o_proj") + FUSED_MLP, UNTIED),
    "glm": Case("GlmForCausalLM", GROUPED | {"head_dim": 16}, ATTENTION + FUSED_MLP, UNTIED),
    "glm4": Case("Glm4ForCausalLM", GROUPED | {"head_dim": 16}, ATTENTION + FUSED_MLP, UNTIED),
    "phi": Case("PhiForCausalLM", GROUPED, each("model.layers.N.self_attn", *QKV, "dense") + FC, UNTIED),
    "starcoder2": Case("Starcoder2ForCausalLM", GROUPED,
                       ATTENTION + each("model.layers.N.mlp", "c_fc", "c_proj"), EMBEDDED),
    "gpt_bigcode": Case("GPTBigCodeForCausalLM", OLD, old("attn", "c_attn", "c_proj"), OLD_EMBEDDED,
                        loads="with dequantize"),
    "gpt_neo": Case("GPTNeoForCausalLM",
                    {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                     "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
                     "bos_token_id": 1, "eos_token_id": 2},
                    old("attn.attention", *QKV, "out_proj"), OLD_EMBEDDED),
    "gptj": Case("GPTJForCausalLM", OLD | {"rotary_dim": 8},
                 old("attn", *QKV, "out_proj", mlp=("fc_in", "fc_out")), GPT_J),
    "codegen": Case("CodeGenForCausalLM", OLD | {"rotary_dim": 8},
                    old("attn", "qkv_proj", "out_proj", mlp=("fc_in", "fc_out")), GPT_J),
    "gpt_neox": Case("GPTNeoXForCausalLM", SIZES, h4("gpt_neox.layers.N", "attention"),
                     {"gpt_neox.embed_in.weight": "embedding", "embed_out.weight": "lm_head"}),
    "persimmon": Case("PersimmonForCausalLM", SIZES, h4("model.layers.N", "self_attn"), UNTIED),
    "falcon": Case("FalconForCausalLM", SIZES | {"ffn_hidden_size": 128}, h4("transformer.h.N", "self_attention"),
                   WORDS, loads="with dequantize"),
    "falcon 40b": Case("FalconForCausalLM", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
                       h4("transformer.h.N", "self_attention"), WORDS, loads="with dequantize"),
    "bloom": Case("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
                  h4("transformer.h.N", "self_attention"), WORDS),
    "mpt": Case("MptForCausalLM", {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
                each("transformer.blocks.N", "attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
                {"transformer.wte.weight": "embedding"}),
    "opt": Case("OPTForCausalLM",
                SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, OPT_LAYER,
                {"model.decoder.embed_tokens.weight": "embedding", "model.decoder.embed_positions.weight": "embedding",
                 "model.decoder.project_in.weight": "head", "model.decoder.project_out.weight": "head"}),
    "xglm": Case("XGLMForCausalLM",
                 {"vocab_size": 96, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4,
                  "max_position_embeddings": 64},
                 each("model.layers.N.self_attn", *QKV, "out_proj") + each("model.layers.N", "fc1", "fc2"), EMBEDDED),
    "mamba": Case("MambaForCausalLM", STATE | {"time_step_rank": 32},
                  each("backbone.layers.N.mixer", "in_proj", "out_proj"),
                  mamba("A_log", "x_proj.weight", "dt_proj.weight"), loads="with dequantize"),
    "mamba2": Case("Mamba2ForCausalLM", STATE | {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
                   each("backbone.layers.N.mixer", "in_proj", "out_proj"), mamba() | {"lm_head.weight": "lm_head"},
                   loads="with dequantize"),
    "falcon_mamba": Case("FalconMambaForCausalLM", STATE | {"time_step_rank": 32},
                         each("backbone.layers.N.mixer", "in_proj", "out_proj"),
                         mamba("A_log", "x_proj.weight", "dt_proj.weight"), loads="with dequantize"),
}  # fmt: skip

# transformers' Conv1D is no `Linear`, and compressed-tensors replaces nothing else: vLLM alone loads these
# (`gpt2.py` turns plain weights round, its linear layers take packed ones as they are).
CONV1D = {
    "gpt2": Case("GPT2LMHeadModel", OLD, old("attn", "c_attn", "c_proj"), OLD_EMBEDDED),
    "openai-gpt": Case("OpenAIGPTLMHeadModel", OLD, old("attn", "c_attn", "c_proj"),
                       {"transformer.tokens_embed.weight": "embedding",
                        "transformer.positions_embed.weight": "embedding"}),
}  # fmt: skip
