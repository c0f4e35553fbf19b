"""A result with one thing wrong in it, which no header shows."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def broken(folder: Path) -> Path:
    """The scales of one weight times four; the header stays as it is."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.down_proj" in name and name.endswith(("scale", "scales")))
    tensors[name] = (tensors[name].float() * 4).to(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    return folder
