"""Small checkpoints with real names, written by safetensors' own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> Tensor:
    """Normal random weights; the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(s * 31**i for i, s in enumerate(shape)))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def llama_tensors(
    hidden: int = 128,
    intermediate: int = 256,
    layers: int = 2,
    vocab: int = 64,
    kv: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """A Llama by its hub names, untied."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: weight(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None, shards: int = 1
) -> Path:
    """A checkpoint folder; with several shards an index too. Defaults to a small Llama. Returns `folder`.

    Sizes that `config` leaves at those of `LLAMA_CONFIG` follow the tensors.
    """
    tensors = llama_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    config = _fitted(LLAMA_CONFIG if config is None else config, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _fitted(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    down = next((t for name, t in tensors.items() if name.endswith("layers.0.mlp.down_proj.weight")), None)
    sizes = {"intermediate_size": down.shape[1], "hidden_size": down.shape[0]} if down is not None else {}
    return config | {key: size for key, size in sizes.items() if config.get(key) == LLAMA_CONFIG[key]}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by safetensors' own reader."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                found[name] = file.get_tensor(name)
    return found


# Independent decoders, written from each format's public description with plain loops over nibbles; they share no
# code with quantconvert.


def unpack_words(words: Tensor, num_bits: int) -> Tensor:
    """int32 [R, P] -> int64 [R, P * 32/b]: the first value in the lowest bits."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    parts = [(wide >> (num_bits * i)) & (2**num_bits - 1) for i in range(32 // num_bits)]
    return torch.stack(parts, dim=-1).reshape(words.shape[0], -1)


def decode_compressed_tensors(tensors: dict[str, Tensor], module: str, num_bits: int) -> Tensor:
    """The weight of a pack-quantized module in its scale's dtype: (u - zero) * scale."""
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    codes = unpack_words(tensors[f"{module}.weight_packed"], num_bits)[:, :columns]
    scale = tensors[f"{module}.weight_scale"]
    if scale.dim() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    zero_point: Tensor | int = 2 ** (num_bits - 1)
    packed = tensors.get(f"{module}.weight_zero_point")
    if packed is not None and packed.dtype == torch.int8:
        zero_point = packed.to(torch.int64).reshape(1, 1) + 2 ** (num_bits - 1)
    elif packed is not None:
        zero_point = unpack_words(packed.t().contiguous(), num_bits).t()[:rows]
        zero_point = zero_point.repeat_interleave(columns // scale.shape[1], 1)
    wide = scale.repeat_interleave(columns // scale.shape[1], 1)
    return (codes - zero_point).to(scale.dtype) * wide


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _unpack_awq(words: Tensor) -> Tensor:
    flat = unpack_words(words, 4).reshape(words.shape[0], -1, 8)
    result = torch.empty_like(flat)
    for nibble, column in enumerate(AWQ_ORDER):
        result[..., column] = flat[..., nibble]
    return result.reshape(words.shape[0], -1)


def decode_awq(tensors: dict[str, Tensor], module: str) -> Tensor:
    """The weight [O, I] of an AWQ GEMM module in float16: (u - z) * s."""
    codes, zeros = _unpack_awq(tensors[f"{module}.qweight"]), _unpack_awq(tensors[f"{module}.qzeros"])
    scales = tensors[f"{module}.scales"]
    size = codes.shape[0] // scales.shape[0]
    weight_IO = (codes - zeros.repeat_interleave(size, 0)).to(scales.dtype) * scales.repeat_interleave(size, 0)
    return weight_IO.t().contiguous()


def decode_gptq(tensors: dict[str, Tensor], module: str, num_bits: int, v1: bool) -> Tensor:
    """The weight [O, I] of a GPTQ module in float16: scales[g_idx] * (u - zero), where v1 stores zero - 1."""
    codes = unpack_words(tensors[f"{module}.qweight"].t().contiguous(), num_bits)
    words = tensors[f"{module}.qzeros"]
    zeros = unpack_words(words + (0x11111111 if num_bits == 4 else 0x01010101) if v1 else words, num_bits)
    groups = tensors[f"{module}.g_idx"].long()
    scales = tensors[f"{module}.scales"]
    return (codes - zeros[groups].t()).to(scales.dtype) * scales[groups].t()


def decode_rtn(tensors: dict[str, Tensor], module: str, num_bits: int) -> Tensor:
    """The ten lines of `quantconvert.layouts.simple`'s docstring, as an engine's author would type them in."""
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    zero_point = tensors.get(f"{module}.weight_zero_point")
    if num_bits == 4:
        weight = torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1)
        weight = weight[: scale.shape[0]] if scale.dim() == 2 else weight
    scale = scale.view(-1, 1) if scale.dim() == 1 else scale
    zero = torch.full_like(scale, 8 if num_bits == 4 else 0) if zero_point is None else zero_point.view(scale.shape)
    size = weight.shape[1] // scale.shape[1]
    scale, zero = (x.repeat_interleave(size, dim=1) for x in (scale, zero))
    return (weight.int() - zero.int()).to(scale.dtype) * scale


def decode_mlx(tensors: dict[str, Tensor], module: str, num_bits: int) -> Tensor:
    """MLX's affine mode: `code * scale + bias`, the first code of a word in its lowest bits."""
    words = tensors[f"{module}.weight"].view(torch.int32).long() & 0xFFFFFFFF
    shifts = torch.arange(0, 32, num_bits)
    codes = ((words.unsqueeze(-1) >> shifts) & (2**num_bits - 1)).flatten(1)
    scales, biases = (tensors[f"{module}.{name}"].float() for name in ("scales", "biases"))
    size = codes.shape[1] // scales.shape[1]
    return codes * scales.repeat_interleave(size, 1) + biases.repeat_interleave(size, 1)


def decode(tensors: dict[str, Tensor], module: str, layout: str, num_bits: int, symmetric: bool) -> Tensor:
    """The weight of one module in any layout, by the decoders above."""
    if layout == "awq":
        return decode_awq(tensors, module)
    if layout == "gptq":
        return decode_gptq(tensors, module, num_bits, v1=symmetric)
    if layout == "rtn":
        return decode_rtn(tensors, module, num_bits)
    if layout == "mlx":
        return decode_mlx(tensors, module, num_bits)
    if f"{module}.weight" in tensors:  # int-quantized
        return decode_rtn(tensors, module, 8)
    return decode_compressed_tensors(tensors, module, num_bits)
