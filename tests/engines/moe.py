"""Tiny random mixtures of experts, built and saved by transformers' own classes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.engines.common import TINY_LLAMA

COMMON: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 128, "num_experts_per_tok": 2, "initializer_range": 0.1, "tie_word_embeddings": False,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def qwen3_moe() -> Any:
    import transformers

    config = transformers.Qwen3MoeConfig(
        **COMMON | {"head_dim": 32}, intermediate_size=256, moe_intermediate_size=64, num_experts=4
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    import transformers

    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, intermediate_size=64, num_local_experts=4)
    )


def deepseek_v3() -> Any:
    """One dense layer, then one with shared and routed experts in two groups; multi-head latent attention."""
    import transformers

    config = transformers.DeepseekV3Config(
        **COMMON, intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8, n_group=2, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32,
        v_head_dim=32,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


# What stays in high precision inside the layers, by the tail of its name.
KEPT = {
    qwen3_moe: {"mlp.gate"},
    mixtral: {"block_sparse_moe.gate"},
    deepseek_v3: {"mlp.gate", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"},
}


def save(build: Callable[[], Any], folder: Path) -> Path:
    """Write the model, with the example's tokenizer; `save_pretrained` gives each expert tensors of its own, as the
    Hub has them.
    """
    torch.manual_seed(0)
    model = build()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, folder)
    return folder
