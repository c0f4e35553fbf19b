"""Checkpoints that are quantized, transposed or fused, and their weights by the public formulas in float64.

They share no code with quantconvert. Values are random codes, so that every code occurs; sizes are asymmetric, so that
no axis can be taken for another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantconvert
from quantconvert.buffers import Workspace
from quantconvert.checkpoint import LocalFolder
from quantconvert.checkpoint.ranges import Files
from quantconvert.families import Dims, Family, FusedExperts, FusedSet, Reason, tables
from quantconvert.sources import open_rows
from tests.builders import weight

E, H, I = 3, 64, 96  # noqa: E741 (the axis, as in quantconvert)
LAYER = "model.layers.0"
LINEAR = (r"\.self_attn\.(q|k|v|o)_proj$", r"\.mlp\.(gate|up|down)_proj$", r"\.experts\.N\.(gate|up|down)_proj$")
FUSED = (FusedSet("qkv_proj", ("q_proj", "k_proj", "v_proj")), FusedSet("gate_up_proj", ("gate_proj", "up_proj")))
SIZES = ("num_experts", "moe_intermediate_size", "hidden_size")


def _experts(transposed: bool, interleaved: bool, bias: str | None = None) -> tuple[FusedExperts, ...]:
    number, inner, outer = SIZES
    return (
        FusedExperts(
            r"\.experts\.gate_up_proj$", ("gate_proj", "up_proj"), number, inner, outer, transposed, interleaved, bias
        ),
        FusedExperts(r"\.experts\.down_proj$", ("down_proj",), number, outer, inner, transposed, False, bias),
    )


DIMS = (
    Dims(r"\.mlp\.(gate|up)_proj$", "intermediate_size", "hidden_size"),
    Dims(r"\.mlp\.down_proj$", "hidden_size", "intermediate_size"),
    Dims(r"\.experts\.N\.(gate|up)_proj$", "moe_intermediate_size", "hidden_size"),
    Dims(r"\.experts\.N\.down_proj$", "hidden_size", "moe_intermediate_size"),
)
KEEP: tuple[tuple[str, Reason], ...] = ((r"\.mlp\.router$", "router"), (r"^lm_head$", "lm_head"))
ROWS = (
    Family("toy-dense", ("toy_dense",), LINEAR, KEEP, FUSED, r"\.experts\.N\.", dims=DIMS),
    Family("toy-turned", ("toy_turned",), LINEAR, KEEP, FUSED, transposed=(r"\.(mlp|self_attn)\.\w+_proj$",)),
    Family("toy-mxfp4", ("toy_mxfp4",), LINEAR, KEEP, FUSED, r"\.experts\.N\.",
           fused_experts=_experts(True, True, "_bias")),
    Family("toy-fused", ("toy_fused",), LINEAR, KEEP, FUSED, r"\.experts\.N\.",
           fused_experts=_experts(False, False)),
    Family("toy-fused-turned", ("toy_fused_turned",), LINEAR, KEEP, FUSED, r"\.experts\.N\.",
           fused_experts=_experts(True, False)),
)  # fmt: skip


@pytest.fixture
def toy_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows above, known to quantconvert."""
    monkeypatch.setattr(tables, "FAMILIES", (*ROWS, *tables.FAMILIES))


@dataclass
class Model:
    """A checkpoint in memory, and by name what its quantized weights are, as float64 [O, I]."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    expected: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path, split: tuple[str, ...] = ()) -> Path:
        """One file, or with `split` a second one for the tensors whose names end in that."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        there = {name: t for name, t in self.tensors.items() if split and name.endswith(split)}
        if not there:
            save_file(self.tensors, folder / "model.safetensors")
            return folder
        here = {name: t for name, t in self.tensors.items() if name not in there}
        files = {"model-00001-of-00002.safetensors": there, "model-00002-of-00002.safetensors": here}
        for file, part in files.items():
            save_file(part, folder / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder


def decoded(source: Path, **options: Any) -> dict[str, Tensor]:
    """Every quantized weight of a plan as float32, by the reader that conversion uses."""
    plan = quantconvert.plan(source, requantize=True, **options)
    files = Files(LocalFolder(source))
    try:
        return {
            task.source.name: open_rows(task.source, files, Workspace(), plan.execution.slab_nbytes)
            .rows(0, task.source.shape[0])
            .clone()
            for task in plan.quantized
        }
    finally:
        files.close()


def random_bytes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def config(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": H, "intermediate_size": I, "moe_intermediate_size": I, "num_experts": E}
    return {"model_type": model_type, **sizes, "num_hidden_layers": 1, "dtype": "float32", **more}


# float8


def fp8_codes(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Every finite code of float8, at random: zeros of both signs, subnormals and the largest among them."""
    raw = random_bytes(*shape, seed=seed)
    bad = ~torch.isfinite(raw.view(dtype).float())
    return raw.masked_fill_(bad, 0x01).view(dtype)


def fp8_scale(shape: tuple[int, ...], dtype: str, seed: int) -> tuple[Tensor, Tensor]:
    """A stored scale and its value in float64; one of several is zero where the dtype has a zero."""
    if dtype in ("U8", "F8_E8M0"):
        raw = 100 + random_bytes(*shape, seed=seed) % 40
        stored = raw if dtype == "U8" else raw.view(torch.float8_e8m0fnu)
        return stored, torch.pow(2.0, raw.double() - 127)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-2 + 1e-3
    if values.numel() > 2:
        values.view(-1)[1] = 0.0
    stored = values.to(kinds[dtype])
    return stored, stored.double()


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """The scale of each element: [a // rows, b // columns] of the matrix of scales."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scale[rows][:, columns]


def scale_shape(kind: str, shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, ...]:
    blocks = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    shapes = {"block": blocks, "[]": (), "[1]": (1,), "[1,1]": (1, 1), "[O]": shape[:1], "[O,1]": (shape[0], 1)}
    return shapes[kind]


SHAPES = {"self_attn.q_proj": (192, 160), "self_attn.k_proj": (64, 160), "self_attn.v_proj": (64, 160),
          "self_attn.o_proj": (160, 192), "mlp.gate_proj": (224, 160), "mlp.up_proj": (224, 160),
          "mlp.down_proj": (160, 224)}  # fmt: skip


def plain_rest(hidden: int) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": weight(48, hidden, seed=50),
        f"{LAYER}.input_layernorm.weight": weight(hidden, seed=51),
        "lm_head.weight": weight(48, hidden, seed=52),
    }


def fp8_model(
    kind: str = "block",
    block: tuple[int, int] = (128, 128),
    scale: str = "F32",
    code: torch.dtype = torch.float8_e4m3fn,
    quantization: dict[str, Any] | None = None,
    suffix: str = "_scale_inv",
) -> Model:
    """A decoder layer in float8; no size is a multiple of 128."""
    if quantization is None:
        quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    sizes = {"hidden_size": 160, "intermediate_size": 224}
    model = Model(plain_rest(160), config("toy_dense", **sizes, quantization_config=quantization))
    for i, (module, shape) in enumerate(SHAPES.items()):
        name = f"{LAYER}.{module}.weight"
        codes = fp8_codes(shape, code, seed=i)
        stored, value = fp8_scale(scale_shape(kind, shape, block), scale, seed=100 + i)
        whole = block if kind == "block" else (1, shape[1]) if "O" in kind else shape
        value = value.reshape(scale_shape("block", shape, whole))
        model.tensors |= {name: codes, name + suffix: stored}
        model.expected[name] = codes.double() * spread(value, shape, whole)
    return model


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def float_quantized(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": "float-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FP8: dict[str, dict[str, Any]] = {
    "block": {},
    "block 64x32": {"block": (64, 32)},
    "block 48x80": {"block": (48, 80)},
    "block 1x128": {"block": (1, 128)},
    "block 128x1": {"block": (128, 1)},
    "block BF16": {"scale": "BF16"},
    "block F16": {"scale": "F16"},
    "block U8": {"scale": "U8"},
    "block E8M0": {"scale": "F8_E8M0", "suffix": "_scale"},
    "block E5M2": {"code": E5M2},
    "tensor []": {"kind": "[]", "suffix": "_scale"},
    "tensor [1]": {"kind": "[1]", "suffix": "_scale"},
    "tensor [1,1]": {"kind": "[1,1]", "scale": "BF16"},
    "channel [O]": {"kind": "[O]", "code": E5M2},
    "channel [O,1]": {"kind": "[O,1]", "scale": "F16", "suffix": "_scale"},
    "fbgemm": {
        "kind": "[O,1]",
        "suffix": "_scale",
        "quantization": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
    },
    "ct channel": {"kind": "[O,1]", "suffix": "_scale", "quantization": float_quantized("channel"), "scale": "BF16"},
    "ct tensor": {"kind": "[1]", "suffix": "_scale", "quantization": float_quantized("tensor")},
    "ct block": {
        "block": (64, 96),
        "suffix": "_scale",
        "quantization": float_quantized("block", block_structure=[64, 96]),
    },
}


# MXFP4

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """float64 [.., rows, columns]: nibbles low first, the fourth bit the sign, times 2^(scale - 127)."""
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    magnitude = torch.tensor(E2M1, dtype=torch.float64)[(nibbles & 7).long()]
    sign = 1.0 - 2.0 * (nibbles >> 3).double()
    return (sign * magnitude * torch.pow(2.0, scales.double() - 127).unsqueeze(-1)).flatten(-2)


def attention(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes = {"q_proj": (H, H), "k_proj": (32, H), "v_proj": (32, H), "o_proj": (H, H)}
    return {
        f"{LAYER}.self_attn.{name}.weight": weight(*shape, seed=60 + i, dtype=dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def mxfp4_model(**more: Any) -> Model:
    """gpt-oss's layout: all experts of a layer in blocks and scales, gate and up interleaved, with biases."""
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    model = Model(plain_rest(H) | attention(), config("toy_mxfp4", quantization_config=block) | more)
    experts, mlp = f"{LAYER}.mlp.experts", f"{LAYER}.mlp"
    model.tensors |= {f"{mlp}.router.weight": weight(E, H, seed=70), f"{mlp}.router.bias": weight(E, seed=71)}
    for i, (name, rows, columns) in enumerate((("gate_up_proj", 2 * I, H), ("down_proj", H, I))):
        blocks = random_bytes(E, rows, columns // 32, 16, seed=80 + i)
        scales = 110 + random_bytes(E, rows, columns // 32, seed=90 + i) % 20
        model.tensors |= {
            f"{experts}.{name}_blocks": blocks,
            f"{experts}.{name}_scales": scales,
            f"{experts}.{name}_bias": weight(E, rows, seed=72 + i),
        }
        values = mxfp4_values(blocks, scales)
        for e in range(E):
            parts = {"gate_proj": values[e, 0::2], "up_proj": values[e, 1::2]}
            for projection, w in parts.items() if name == "gate_up_proj" else [("down_proj", values[e])]:
                model.expected[f"{experts}.{e}.{projection}.weight"] = w
    return model


# Plain weights in shapes of their own


def turned_model() -> Model:
    """Every matrix stored [in, out]."""
    model = Model(plain_rest(H), config("toy_turned"))
    shapes = {"self_attn.o_proj": (H, I), "mlp.up_proj": (I, H), "mlp.down_proj": (H, I)}
    for i, (module, shape) in enumerate(shapes.items()):
        w = weight(*shape, seed=30 + i, dtype=torch.float32)
        model.tensors[f"{LAYER}.{module}.weight"] = w.t().contiguous()
        model.expected[f"{LAYER}.{module}.weight"] = w.double()
    return model


def fused_model(transposed: bool, interleaved: bool = False) -> Model:
    """All experts of a layer in one tensor each: gate before up, or row by row in turn."""
    kind = "toy_mxfp4" if interleaved else "toy_fused_turned" if transposed else "toy_fused"
    model = Model(plain_rest(H) | attention(torch.float32), config(kind))
    stem = f"{LAYER}.mlp.experts"
    parts = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    experts = {n: weight(E, *s, seed=40 + i, dtype=torch.float32) for i, (n, s) in enumerate(parts.items())}
    both = (experts["gate_proj"], experts["up_proj"])
    gate_up = torch.stack(both, 2).flatten(1, 2) if interleaved else torch.cat(both, 1)
    stored = {"gate_up_proj": gate_up, "down_proj": experts["down_proj"]}
    for name, w in stored.items():
        model.tensors[f"{stem}.{name}"] = w.transpose(1, 2).contiguous() if transposed else w
    for name, w in experts.items():
        model.expected |= {f"{stem}.{e}.{name}.weight": w[e].double() for e in range(E)}
    model.expected |= {name: t.double() for name, t in model.tensors.items() if "self_attn" in name}
    return model


def fused_fp8_model() -> Model:
    """All experts in one float8 tensor, with a scale for each row."""
    model = fused_model(False)
    stem = f"{LAYER}.mlp.experts"
    model.config["quantization_config"] = {"quant_method": "fp8"}
    model.expected = {}
    for name in ("gate_up_proj", "down_proj"):
        w = model.tensors[f"{stem}.{name}"]
        scale = w.abs().amax(-1, keepdim=True) / 448
        codes = (w / scale).to(torch.float8_e4m3fn)
        model.tensors |= {f"{stem}.{name}": codes, f"{stem}.{name}_scale": scale}
        values = codes.double() * scale.double()
        parts = {"gate_proj": values[:, :I], "up_proj": values[:, I:]} if "gate" in name else {"down_proj": values}
        for projection, w in parts.items():
            model.expected |= {f"{stem}.{e}.{projection}.weight": w[e] for e in range(E)}
    return model
