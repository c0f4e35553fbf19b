"""Statistics files of made-up numbers, written by safetensors' own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_statistics(
    path: Path,
    widths: Mapping[str, int],
    shared: Mapping[str, str] | None = None,
    change: Mapping[str, Tensor | None] | None = None,
    **metadata: str,
) -> Path:
    """A file with the inputs of modules of these widths; `shared`: modules that read what another does.

    The largest number of the i-th input is i + 1. change: tensors by name, or None for one that is left out.
    """
    tensors: dict[str, Tensor] = {}
    for i, (module, width) in enumerate(widths.items()):
        largest = torch.linspace(0, i + 1, width)
        tensors |= {f"{module}.second_moment": largest.square() / 4, f"{module}.channel_max": largest}
        tensors[f"{module}.max"] = torch.tensor([i + 1.0])
    tensors = {name: tensor for name, tensor in {**tensors, **(change or {})}.items() if tensor is not None}
    inputs = {module: module for module in widths} | dict(shared or {})
    about = {"model_type": "llama", "num_tokens": "256", "seed": "0", "inputs": json.dumps(inputs)} | metadata
    save_file(tensors, path, metadata={key: value for key, value in about.items() if value})
    return path


def llama_statistics(path: Path, layers: int = 2, hidden: int = 128, intermediate: int = 256, **how: object) -> Path:
    """Statistics of the small Llama of `tests.builders`."""
    widths: dict[str, int] = {}
    shared: dict[str, str] = {}
    for i in range(layers):
        layer = f"model.layers.{i}"
        widths |= {f"{layer}.self_attn.q_proj": hidden, f"{layer}.self_attn.o_proj": hidden}
        widths |= {f"{layer}.mlp.gate_proj": hidden, f"{layer}.mlp.down_proj": intermediate}
        shared |= {f"{layer}.self_attn.{name}": f"{layer}.self_attn.q_proj" for name in ("k_proj", "v_proj")}
        shared |= {f"{layer}.mlp.up_proj": f"{layer}.mlp.gate_proj"}
    return write_statistics(path, widths, shared, **how)  # type: ignore[arg-type]
