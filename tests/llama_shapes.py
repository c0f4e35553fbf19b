"""Checkpoints of Llamas without their data: names, dtypes and shapes as on the Hub, in sparse files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.raw_files import write_headers

VOCAB = 128256


class Sizes(NamedTuple):
    """Widths of a layer, and how many there are."""

    hidden: int
    intermediate: int
    kv: int
    layers: int
    heads: int


LLAMA_1B, LLAMA_70B = Sizes(2048, 8192, 512, 16, 32), Sizes(8192, 28672, 1024, 80, 64)


def _layer(number: int, sizes: Sizes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    hidden, intermediate, kv = sizes[:3]
    for name, shape in (
        ("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)),
        ("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (kv, hidden)),
        ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, hidden)),
        ("mlp.gate_proj", (intermediate, hidden)), ("mlp.up_proj", (intermediate, hidden)),
        ("mlp.down_proj", (hidden, intermediate)),
    ):  # fmt: skip
        yield f"model.layers.{number}.{name}.weight", "BF16", shape


def _write(folder: Path, sizes: Sizes, layers_a_file: int) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "num_key_value_heads": 8, "vocab_size": VOCAB,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    around = [
        ("model.embed_tokens.weight", "BF16", (VOCAB, sizes.hidden)), ("model.norm.weight", "BF16", (sizes.hidden,)),
        ("lm_head.weight", "BF16", (VOCAB, sizes.hidden)),
    ]  # fmt: skip
    starts = range(0, sizes.layers, layers_a_file)
    parts = [[entry for i in range(n, n + layers_a_file) for entry in _layer(i, sizes)] for n in starts]
    files = {f"model-{i:05d}-of-{len(parts) + 1:05d}.safetensors": part for i, part in enumerate([around, *parts], 1)}
    return write_headers(folder, files, config)


def write_llama_70b(folder: Path) -> Path:
    """The folder with config, index and a file a layer, of which only the headers take space on the disk."""
    return _write(folder, LLAMA_70B, 1)


def write_llama_1b(folder: Path) -> Path:
    """The same of Llama-3.2-1B's shapes with a head of its own: 3.0 GB in 5 files."""
    return _write(folder, LLAMA_1B, 4)
