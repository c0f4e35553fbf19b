"""The checkpoint of a 70B Llama without its data: names, dtypes and shapes as on the Hub, in sparse files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

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
    folder.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate([around, *(list(_layer(i)) for i in range(LAYERS))], 1):
        file, header, offset = f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors", {}, 0
        for name, shape in shard:
            end = offset + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
