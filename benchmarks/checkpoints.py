"""Checkpoints to time conversions with: random bfloat16 weights, real names and shapes.

python benchmarks/checkpoints.py {dense,experts} FOLDER [--shards N]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def dense() -> tuple[Shapes, dict[str, Any]]:
    """Names, shapes and config of Llama-3.2-1B with an lm_head of its own: 3.0 GB."""
    hidden, intermediate, layers, vocab, kv, heads = 2048, 8192, 16, 128256, 512, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= _attention(layer, hidden, hidden, kv)
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "tie_word_embeddings": False}
    config |= {"architectures": ["LlamaForCausalLM"], "intermediate_size": intermediate, "vocab_size": vocab}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500000.0, "dtype": "bfloat16"}
    return shapes, config | {"num_attention_heads": heads, "num_key_value_heads": heads * kv // hidden}


def experts() -> tuple[Shapes, dict[str, Any]]:
    """A Qwen3-MoE of 8 layers with 128 experts each, 3,072 matrices of half a megabyte: 1.7 GB."""
    hidden, inner, layers, count, vocab = 1024, 256, 8, 128, 32768
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= _attention(layer, hidden, hidden, hidden // 4) | {f"{layer}.mlp.gate.weight": (count, hidden)}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (64,) for name in "qk"}
        for j in range(count):
            expert = f"{layer}.mlp.experts.{j}"
            shapes |= {f"{expert}.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            shapes |= {f"{expert}.down_proj.weight": (hidden, inner)}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "hidden_size": hidden, "num_experts": count}
    config |= {"moe_intermediate_size": inner, "tie_word_embeddings": False, "num_attention_heads": 16}
    return shapes, config | {"num_key_value_heads": 4, "head_dim": 64}


def _attention(layer: str, hidden: int, queries: int, kv: int) -> Shapes:
    return {
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (queries, hidden),
        f"{layer}.self_attn.k_proj.weight": (kv, hidden),
        f"{layer}.self_attn.v_proj.weight": (kv, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, queries),
    }


KINDS = {"dense": dense, "experts": experts}


def make(kind: str, folder: Path, num_shards: int = 4) -> None:
    """Write a checkpoint; what stands in its place is removed."""
    import torch
    from safetensors.torch import save_file

    shapes, config = KINDS[kind]()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    names, weight_map = list(shapes), {}
    bounds = [len(names) * i // num_shards for i in range(num_shards + 1)]
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[bounds[i] : bounds[i + 1]]
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in part},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args()
    make(args.kind, args.folder, args.shards)


if __name__ == "__main__":
    main()
