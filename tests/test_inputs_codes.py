"""Integer codes as compressed-tensors, GPTQ and AWQ store them: what is read, converted, repacked and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from tests.builders import decode_compressed_tensors, read_tensors, weight
from tests.coded import GROUP, awq_model, gptq_model, kimi_model
from tests.inputs import LAYER, Model, attention, config, decoded, plain_rest

pytestmark = pytest.mark.usefixtures("toy_families")


MODELS: dict[str, Any] = {
    "kimi": kimi_model,
    "awq": awq_model,
    "gptq v1": lambda: gptq_model(4, "gptq", False, False),
    "gptq v2": lambda: gptq_model(4, "gptq_v2", False, False),
    "gptq v1 symmetric": lambda: gptq_model(4, "gptq", False, True),
    "gptq v2 symmetric": lambda: gptq_model(4, "gptq_v2", False, True),
    "gptq v1 desc_act": lambda: gptq_model(4, "gptq", True, False),
    "gptq v2 desc_act": lambda: gptq_model(4, "gptq_v2", True, True),
    "gptq v1 int8": lambda: gptq_model(8, "gptq", False, True),
    "gptq v2 int8 desc_act": lambda: gptq_model(8, "gptq_v2", True, False),
}


@pytest.mark.parametrize("kind", MODELS)
def test_codes_are_read_as_their_owners_do(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    found = decoded(source, group_size=GROUP)
    assert set(found) == set(model.expected)
    for name, w in found.items():
        assert torch.equal(w, model.expected[name].float()), name
    quantconvert.dequantize(source, tmp_path / "out", "float32")
    plain = read_tensors(tmp_path / "out")
    assert all(torch.equal(plain[name], w) for name, w in found.items())


@pytest.mark.parametrize("kind", MODELS)
def test_int4_to_int8_stays_within_half_a_step(tmp_path: Path, kind: str):
    """It needs no --requantize from four bits. Beyond half a step lies what a scale of 16 bits cuts off."""
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    options: dict[str, Any] = {"bits": 8, "group_size": GROUP, "format": "compressed-tensors", "symmetric": True}
    quantconvert.convert(source, tmp_path / "out", requantize="int8" in kind, **options)
    stored = read_tensors(tmp_path / "out")
    for name, expected in model.expected.items():
        module = name.removesuffix(".weight")
        scale = stored[f"{module}.weight_scale"]
        wide = {**stored, f"{module}.weight_scale": scale.float()}
        error = (decode_compressed_tensors(wide, module, 8).double() - expected).abs()
        highest = expected.view(scale.shape[0], -1, GROUP).abs().amax(-1)
        allowed = torch.maximum(scale.double() * 0.501, highest - 127 * scale.double())
        assert bool((error <= allowed.repeat_interleave(GROUP, 1)).all()), name


@pytest.mark.parametrize("kind", ["kimi", "awq", "gptq v1 desc_act"])
def test_partners_in_other_files(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    suffixes = ("weight_scale", "weight_shape", "scales", "qzeros", "g_idx")
    apart = model.write(tmp_path / "apart", split=suffixes)
    assert len(list(apart.glob("*.safetensors"))) == 2
    found = decoded(apart, group_size=GROUP)
    assert all(torch.equal(w, model.expected[name].float()) for name, w in found.items())


@pytest.mark.parametrize("kind", ["kimi", "awq", "gptq v2", "gptq v1 desc_act"])
def test_tiles_do_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    from quantconvert.planning import memory

    source = MODELS[kind]().write(tmp_path / "model")
    options: dict[str, Any] = {"bits": 4, "group_size": GROUP, "format": "gptq", "requantize": True}
    quantconvert.convert(source, tmp_path / "whole", **options)
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 1500)
    monkeypatch.setattr(memory, "MAX_SLAB_NBYTES", 3000)
    quantconvert.convert(source, tmp_path / "tiled", **options)
    one, other = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "tiled")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_kimi_keeps_what_it_left_alone(tmp_path: Path):
    model = kimi_model()
    source = model.write(tmp_path / "model")
    result = quantconvert.convert(source, tmp_path / "out", bits=8, group_size=GROUP, format="compressed-tensors")
    assert {task.source.name for task in result.plan.quantized} == set(model.expected)
    reasons = {task.source.name: task.reason for task in result.plan.kept}
    found = read_tensors(tmp_path / "out")
    for name in (name for name in model.tensors if "self_attn" in name):
        assert reasons[name] == "plain"
        assert torch.equal(found[name], model.tensors[name])


def test_our_own_kimi_is_read_back(tmp_path: Path):
    """The same from our own writer: experts in int4, the rest ignored."""
    plain = Model(plain_rest(64) | attention(), config("toy_dense"))
    for e in range(3):
        for i, (projection, shape) in enumerate(
            (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
        ):
            plain.tensors[f"{LAYER}.mlp.experts.{e}.{projection}.weight"] = weight(*shape, seed=10 * e + i)
    options: dict[str, Any] = {"scheme": "W4A16:g32", "format": "compressed-tensors", "ignore": ["*.self_attn.*"]}
    result = quantconvert.convert(plain.write(tmp_path / "plain"), tmp_path / "coded", **options)
    stored = read_tensors(tmp_path / "coded")
    wide = {name: t.float() if name.endswith("scale") else t for name, t in stored.items()}
    found = decoded(tmp_path / "coded", bits=8, group_size=GROUP)
    assert set(found) == {task.source.name for task in result.plan.quantized}
    for name, w in found.items():
        assert torch.equal(w, decode_compressed_tensors(wide, name.removesuffix(".weight"), 4)), name
