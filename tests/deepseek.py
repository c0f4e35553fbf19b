"""DeepSeek-V3's checkpoint without its data: every name, dtype and shape of the Hub's, in sparse files."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from quantconvert.dtypes import nbytes_of
from tests.raw_files import write_headers

HIDDEN, DENSE, EXPERT, EXPERTS, LAYERS, VOCAB = 7168, 18432, 2048, 256, 61, 129280
NUM_TENSORS = 91_991  # as in the Hub's model.safetensors.index.json
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": HIDDEN,
    "intermediate_size": DENSE, "moe_intermediate_size": EXPERT, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3, "vocab_size": VOCAB,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip
Entry = tuple[str, str, tuple[int, ...]]


def _linear(name: str, rows: int, columns: int) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def _mlp(name: str, width: int) -> Iterator[Entry]:
    yield from _linear(f"{name}.gate_proj", width, HIDDEN)
    yield from _linear(f"{name}.up_proj", width, HIDDEN)
    yield from _linear(f"{name}.down_proj", HIDDEN, width)


def _layer(number: int) -> Iterator[Entry]:
    name = f"model.layers.{number}"
    if number == LAYERS:  # multi-token prediction
        yield f"{name}.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
        yield f"{name}.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
        yield f"{name}.shared_head.head.weight", "BF16", (VOCAB, HIDDEN)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{name}.{norm}.weight", "BF16", (HIDDEN,)
    for norm, width in (
        ("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN), ("self_attn.q_a_layernorm", 1536),
        ("self_attn.kv_a_layernorm", 512),
    ):  # fmt: skip
        yield f"{name}.{norm}.weight", "BF16", (width,)
    for layer, rows, columns in (
        ("q_a_proj", 1536, HIDDEN), ("q_b_proj", 24576, 1536), ("kv_a_proj_with_mqa", 576, HIDDEN),
        ("kv_b_proj", 32768, 512), ("o_proj", HIDDEN, 16384),
    ):  # fmt: skip
        yield from _linear(f"{name}.self_attn.{layer}", rows, columns)
    if number < 3:
        yield from _mlp(f"{name}.mlp", DENSE)
        return
    yield f"{name}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
    yield f"{name}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
    yield from _mlp(f"{name}.mlp.shared_experts", EXPERT)
    for expert in range(EXPERTS):
        yield from _mlp(f"{name}.mlp.experts.{expert}", EXPERT)


def entries() -> Iterator[Entry]:
    """Name, dtype and shape of every tensor."""
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
    for number in range(LAYERS + 1):
        yield from _layer(number)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN)


def write_deepseek_v3(folder: Path) -> Path:
    """The folder with config, index and files of 4.3 GB, of which only the headers take space on the disk."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries():
        nbytes = nbytes_of(entry[1], prod(entry[2]))
        if used + nbytes > 4_300_000_000:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += nbytes
    files = {f"model-{number:05d}-of-{len(shards):06d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    return write_headers(folder, files, CONFIG)
