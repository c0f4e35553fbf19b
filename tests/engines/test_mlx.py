"""mlx-lm reads our mlx and AWQ: each weight as independently decoded, and the logits of those weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quantconvert
from tests.builders import decode_awq, decode_mlx, read_tensors, write_checkpoint
from tests.engines import dense_families, moe_families
from tests.engines.common import TINY_LLAMA
from tests.engines.families import save

mx = pytest.importorskip("mlx.core")
utils = pytest.importorskip("mlx_lm.utils")

FAMILIES = (
    "llama", "llama tied", "llama biases", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "smollm3",
    "seed_oss", "olmo2", "cohere", "hunyuan_v1_dense", "nemotron", "phi3", "glm", "phi", "starcoder2", "gptj", "mamba",
    "falcon_mamba",
)  # fmt: skip
IDS = list(range(3, 40))


def bits_of(config: dict[str, Any], module: str) -> int:
    found: int = config["quantization"].get(module, config["quantization"])["bits"]
    return found


def decoded(folder: Path) -> dict[str, Tensor]:
    tensors, config = read_tensors(folder), json.loads((folder / "config.json").read_text())
    modules = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if config["quantization_config"]["quant_method"] == "awq":
        return {module: decode_awq(tensors, module).float() for module in modules}
    return {module: decode_mlx(tensors, module, bits_of(config, module)) for module in modules}


def plain_twin(source: Path, folder: Path, twin: Path) -> Path:
    """What is stored, as a plain checkpoint in float32."""
    weights = {f"{module}.weight": weight for module, weight in decoded(folder).items()}
    tensors = {name: weights.get(name, tensor).float().contiguous() for name, tensor in read_tensors(source).items()}
    kept = {
        name: tensor.float() for name, tensor in read_tensors(folder).items() if name in tensors.keys() - weights.keys()
    }
    return write_checkpoint(twin, tensors | kept, json.loads((source / "config.json").read_text()))


def load(folder: Path) -> Any:
    """By mlx-lm, strictly: a tensor without a place is an error. In float32."""
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)
    return model


def logits(model: Any) -> Tensor:
    return torch.from_numpy(np.array(model(mx.array([IDS]))))


def quantized_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if "QuantizedLinear" in type(module).__name__}


def assert_same(source: Path, folder: Path, work: Path) -> None:
    model = load(folder)
    found, expected = logits(model), logits(load(plain_twin(source, folder, work / "twin")))
    moved = (expected - logits(load(source))).abs().max()
    assert moved > 1e-2
    # of AWQ's weights mlx-lm rounds zero point times scale to float16, and computes with that
    assert (found - expected).abs().max() < 2e-2 * moved
    assert len(quantized_layers(model)) == len(decoded(folder))


@pytest.mark.parametrize("layout", ["mlx", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, layout: str, tmp_path: Path):
    source = save(dense_families.CASES[family], tmp_path / "in")
    quantconvert.convert(source, tmp_path / "out", group_size=32, engines=["mlx-lm"], format=layout)
    assert_same(source, tmp_path / "out", tmp_path)


# What transformers 5 does not write, and mlx-lm wants as the checkpoints on the Hub have it.
ON_THE_HUB: dict[str, Any] = {"rope_theta": 10000.0, "rope_scaling": None}
YARN = {
    "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# By model type: what differs from the case of other tests, and what stands in config.json beside it.
EXPERTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({"head_dim": 16}, {}),
    "qwen2_moe": ({"mlp_only_layers": [], "decoder_sparse_step": 1, "head_dim": 16}, {}),
    "olmoe": ({}, {}),
    "deepseek_v2": ({"q_lora_rank": 64}, {"topk_method": "group_limited_greedy", "rope_scaling": YARN}),
    "deepseek_v3": ({}, {}),
    "deepseek_v32": ({}, {}),
    "glm4_moe": ({}, {"partial_rotary_factor": 0.5}),
    "glm4_moe_lite": ({}, {}),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, tmp_path: Path):
    """Stacked by mlx-lm from what is stored one by one: the logits are those of the decoded weights."""
    case, (other, beside) = moe_families.CASES[name], EXPERTS[name]
    source = save(replace(case, config=case.config | other), tmp_path / "in")
    config = json.loads((source / "config.json").read_text()) | ON_THE_HUB | beside
    (source / "config.json").write_text(json.dumps(config))
    quantconvert.convert(source, tmp_path / "out", group_size=32, engines=["mlx-lm"], verify=True)
    model = load(tmp_path / "out")
    found, expected = logits(model), logits(load(plain_twin(source, tmp_path / "out", tmp_path / "twin")))
    assert (expected - logits(load(source))).abs().max() > 1e-2
    assert torch.equal(found, expected)
    assert any("QuantizedSwitch" in type(module).__name__ for _, module in model.named_modules())


def test_experts_that_mlx_lm_does_not_stack_are_refused(tmp_path: Path):
    source = save(moe_families.CASES["qwen3_moe"], tmp_path / "in")
    with pytest.raises(quantconvert.UnsupportedError, match="mlx-lm"):
        quantconvert.plan(source, group_size=32, engines=["mlx-lm"])


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 128}, {"group_size": 64, "symmetric": True}, {"bits": 8, "group_size": 32},
        {"group_size": 64, "symmetric": True, "method": "full-range"},
        {"group_size": 64, "rules": ["*.down_proj=W8A16:g32"]}, {"group_size": 32, "ignore": ["*.layers.0.*"]},
    ],
    ids=str,
)  # fmt: skip
def test_schemes(options: dict[str, Any], tmp_path: Path):
    quantconvert.convert(TINY_LLAMA, tmp_path / "out", format="mlx", verify=True, **options)
    assert_same(TINY_LLAMA, tmp_path / "out", tmp_path)


def test_mlx_lm_s_own_checkpoints_are_read(tmp_path: Path):
    """With its scales of both signs: dequantized they are what mlx itself computes, and nothing else can hold them."""
    model, config = utils.load_model(TINY_LLAMA)
    model, config = utils.quantize_model(model, config, group_size=64, bits=4)
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(config, tmp_path / "theirs" / "config.json")
    assert any((t < 0).any() for name, t in read_tensors(tmp_path / "theirs").items() if name.endswith("scales"))
    with pytest.raises(quantconvert.UnsupportedError, match="biases are any numbers"):
        quantconvert.repack(tmp_path / "theirs", tmp_path / "packed", format="gptq")
    quantconvert.dequantize(tmp_path / "theirs", tmp_path / "plain", dtype="float32")
    plain = read_tensors(tmp_path / "plain")
    layers = quantized_layers(model)
    assert len(layers) > 20
    for name, layer in layers.items():
        scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
        expected = torch.from_numpy(np.array(mx.dequantize(layer.weight, scales, biases, 64, 4)))
        assert torch.allclose(plain[f"{name}.weight"], expected, rtol=0, atol=1e-6)
