"""What transformers computes from rtn folders, through our integration, is what the layout's ten-line decoder says.

The reference is the original with each quantized weight replaced by `decode_rtn`, loaded as an ordinary checkpoint in
the same dtype. Both multiply the same weights in the same order, so logits must be equal bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import quantconvert.integrations.transformers  # noqa: F401 (registers rtn)
from quantconvert.api import convert
from quantconvert.integrations.rtn_linear import RtnLinear
from quantconvert.schemes import Scheme
from tests.builders import LLAMA_CONFIG, decode_rtn, llama_tensors, read_tensors, weight, write_checkpoint
from tests.engines import moe
from tests.engines.common import TINY_LLAMA, heldout_windows, load, logits

DENSE: dict[str, dict[str, Any]] = {
    "int4 g128": {},
    "int4 g128 asymmetric": {"symmetric": False},
    "int4 channel": {"group_size": -1},
    "int8 channel": {"bits": 8, "group_size": -1},
    "int8 g128 asymmetric": {"bits": 8, "symmetric": False},
    "int4 per tensor": {"group_size": 0},
    "mixed": {"rules": [r"re:.*layers\.(0|3)\..*=W8A16"]},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "int4 g32 asymmetric": {"group_size": 32, "symmetric": False},
    "int4 per tensor": {"group_size": 0},
    "int8 channel": {"bits": 8, "group_size": -1},
    "mixed": {"group_size": 64, "rules": [r"re:.*layers\.0\..*experts\.\d.*=W8A16:channel"]},
    "kept experts": {"group_size": 64, "rules": [r"re:.*layers\.0\..*experts\.\d.*=skip"]},
}


def decoded(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every quantized weight by module name. The shapes tell the width: int4 has half the rows of its scale."""
    tensors = read_tensors(folder)
    found = {}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        tensors[name] = tensors[name].to(dtype)
        rows, codes = read_rows(folder, module), tensors[f"{module}.weight"]
        found[module] = decode_rtn(tensors, module, 8 if codes.shape[0] == rows else 4)
    return found


def read_rows(folder: Path, module: str) -> int:
    """out_features, from the original that lies beside the converted folder."""
    return read_tensors(folder.parent / "original")[f"{module}.weight"].shape[0]


def convert_and_load(original: Path, work: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """The converted folder `work / "out"` as transformers loads it, and the reference."""
    (work / "original").symlink_to(original)
    convert(original, work / "out", format="rtn", **options)
    tensors, weights = read_tensors(original), decoded(work / "out", dtype)
    assert weights
    tensors |= {f"{module}.weight": weight for module, weight in weights.items()}
    config = json.loads((original / "config.json").read_text())
    reference = write_checkpoint(work / "reference", {k: v.contiguous() for k, v in tensors.items()}, config)
    return load(work / "out", dtype=dtype), load(reference, dtype=dtype)


def token_ids(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))


def assert_same(model: Any, reference: Any, ids: Tensor) -> None:
    """The same logits and the same continuation."""
    assert torch.equal(logits(model, ids), logits(reference, ids))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    continued = model.generate(ids[:1], **options)
    assert continued.shape == (1, ids.shape[1] + 8)
    assert torch.equal(continued, reference.generate(ids[:1], **options))


def bits_by_layer(model: Any) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RtnLinear):
            found.setdefault(int(name.split(".")[2]), set()).add(module.bits)
    return found


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE)
def test_dense_is_the_reference(options: dict[str, Any], tmp_path: Path):
    model, reference = convert_and_load(TINY_LLAMA, tmp_path, **options)
    assert_same(model, reference, heldout_windows()[:2])
    linears = {name for name, module in reference.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, m in model.named_modules() if isinstance(m, RtnLinear)} == linears - {"lm_head"}
    bits = {layer: {options.get("bits", 4)} for layer in range(4)}
    assert bits_by_layer(model) == bits | ({0: {8}, 3: {8}} if "rules" in options else {})


def test_the_dtype_of_the_files(tmp_path: Path):
    model, reference = convert_and_load(TINY_LLAMA, tmp_path, torch.bfloat16, symmetric=False)
    assert model.model.layers[0].mlp.down_proj.weight_scale.dtype == torch.bfloat16
    assert_same(model, reference, heldout_windows()[:2])


@pytest.mark.parametrize("options", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("build", [moe.qwen3_moe, moe.mixtral], ids=lambda build: build.__name__)
def test_experts_are_the_reference(build: Callable[[], Any], options: dict[str, Any], tmp_path: Path):
    model, reference = convert_and_load(moe.save(build, tmp_path / "saved"), tmp_path, **options)
    assert_same(model, reference, token_ids(model))
    for name, tensor in reference.state_dict().items():
        if "experts" in name or name.endswith("mlp.gate.weight"):
            assert torch.equal(model.state_dict()[name], tensor), name


def test_shared_experts_and_latent_attention(tmp_path: Path):
    model, reference = convert_and_load(moe.save(moe.deepseek_v3, tmp_path / "saved"), tmp_path, group_size=32)
    assert_same(model, reference, token_ids(model))
    assert isinstance(model.model.layers[1].mlp.shared_experts.down_proj, RtnLinear)


def test_odd_out_features_of_a_whole_model(tmp_path: Path):
    config = LLAMA_CONFIG | {"intermediate_size": 201}
    original = write_checkpoint(tmp_path / "saved", llama_tensors(intermediate=201), config)
    model, reference = convert_and_load(original, tmp_path, group_size=-1, symmetric=False)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (101, 128)
    assert_same(model, reference, token_ids(model))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_odd_out_features_by_hand(symmetric: bool, groups: int):
    """7 rows of 16 columns: byte row 3 holds row 6 and an empty high nibble."""
    scheme = Scheme(4, symmetric, "channel" if groups == 1 else "group", None if groups == 1 else 8)
    layer = RtnLinear(nn.Linear(16, 7), scheme)
    codes = torch.arange(7 * 16).mul(5).remainder(16).view(7, 16)
    scale, zero_point = torch.arange(1.0, 1 + 7 * groups).view(7, groups), torch.arange(7 * groups).view(7, groups)
    layer.weight_scale.copy_(scale)
    if layer.weight_zero_point is not None:
        layer.weight_zero_point.copy_(zero_point)
    expected = torch.empty(7, 16)
    for row in range(7):
        for column in range(16):
            byte = layer.weight[row // 2]
            byte[column] = byte[column] | codes[row, column] << 4 if row % 2 else codes[row, column]
            group = column * groups // 16
            zero = 8 if symmetric else zero_point[row, group]
            expected[row, column] = (codes[row, column] - zero) * scale[row, group]
    assert layer.weight.shape == (4, 16)
    assert torch.equal(layer.dequantize(), expected)
    inputs = weight(3, 16, dtype=torch.float32)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, expected, layer.bias))


def test_save_and_dequantize(tmp_path: Path):
    model, _ = convert_and_load(TINY_LLAMA, tmp_path, symmetric=False, rules=DENSE["mixed"]["rules"])
    ids = heldout_windows()[:1]
    expected = logits(model, ids)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".weight_" in name)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), expected)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain"), ids), expected)


def test_experts_cannot_be_saved_but_dequantized(tmp_path: Path):
    model, _ = convert_and_load(moe.save(moe.mixtral, tmp_path / "saved"), tmp_path, group_size=64)
    expected = logits(model, token_ids(model))
    with pytest.raises(ValueError, match="quantized with rtn and is not serializable"):
        model.save_pretrained(tmp_path / "again")
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert read_tensors(tmp_path / "plain").keys() == read_tensors(tmp_path / "saved").keys()
    assert torch.equal(logits(load(tmp_path / "plain"), token_ids(model)), expected)
