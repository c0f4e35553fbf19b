"""The checkpoint of a 70B Llama without its data: names, dtypes and shapes as on the Hub, in sparse files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.raw_files import write_headers

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, KV = 8192, 28672, 80, 128256, 1024
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": VOCAB, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def _layer(number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (
        ("input_layernorm", (HIDDEN,)), ("post_attention_layernorm", (HIDDEN,)),
        ("self_attn.q_proj", (HIDDEN, HIDDEN)), ("self_attn.k_proj", (KV, HIDDEN)), ("self_attn.v_proj", (KV, HIDDEN)),
        ("self_attn.o_proj", (HIDDEN, HIDDEN)), ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
        ("mlp.up_proj", (INTERMEDIATE, HIDDEN)), ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
    ):  # fmt: skip
        yield f"model.layers.{number}.{name}.weight", shape


def write_llama_70b(folder: Path) -> Path:
    """The folder with config, index and a file a layer, of which only the headers take space on the disk."""
    around: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (VOCAB, HIDDEN)), ("model.norm.weight", (HIDDEN,)),
        ("lm_head.weight", (VOCAB, HIDDEN)),
    ]  # fmt: skip
    shards = [around, *(list(_layer(i)) for i in range(LAYERS))]
    files = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": [(name, "BF16", shape) for name, shape in shard]
        for number, shard in enumerate(shards, 1)
    }
    return write_headers(folder, files, CONFIG)
