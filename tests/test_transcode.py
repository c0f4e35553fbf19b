"""Back and across: repack keeps codes, scales and zero points; dequantize gives what independent decoders give."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.layouts import LAYOUTS
from quantconvert.schemes import Scheme
from tests.builders import LLAMA_CONFIG, decode, llama_tensors, read_tensors, weight, write_checkpoint

SCHEMES = [
    "W4A16",
    "W4A16_ASYM",
    "W4A16:channel",
    "W8A16",
    "W8A16_ASYM:g64",
    "W8A16:channel",
    "W4A16:tensor",
    "W8A8",
    "W4A8",
]

ONE_LAYER = LLAMA_CONFIG | {"num_hidden_layers": 1}


def holds(layout: str, scheme: Scheme) -> bool:
    plain = Scheme(scheme.num_bits, scheme.symmetric, scheme.strategy, scheme.group_size)
    return not LAYOUTS.find(layout).problems(plain, (128, 128), "M")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales from float16's own range, so that every layout can hold them."""
    tensors = llama_tensors(layers=1) | {"model.layers.0.mlp.up_proj.weight": weight(256, 128, seed=7, scale=0.5)}
    config = ONE_LAYER
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", tensors, config, shards=2)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with scales in float32, where every product is exact or rounded as float32."""
    return {k: t.float() if k.endswith(("scales", "weight_scale")) else t for k, t in tensors.items()}


def weights(folder: Path, plan: quantconvert.Plan) -> dict[str, Tensor]:
    """Every quantized weight of a folder in float32, by the independent decoders."""
    tensors = wide(read_tensors(folder))
    found = {}
    for task in plan.quantized:
        assert task.scheme
        module = task.source.name.removesuffix(".weight")
        found[module] = decode(tensors, module, plan.format, task.scheme.num_bits, task.scheme.symmetric)
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_repack_through_every_pair_and_dequantize(source: Path, tmp_path: Path, name: str):
    first = next(layout for layout in ("rtn", "compressed-tensors") if not name.endswith("A8") or layout != "rtn")
    start = quantconvert.convert(source, tmp_path / "start", scheme=name, format=first)
    original = read_tensors(tmp_path / "start")
    scheme = start.plan.scheme
    assert scheme
    expected = weights(tmp_path / "start", start.plan)
    layouts = [layout for layout in LAYOUTS if holds(layout, scheme)]
    assert len(layouts) >= 2
    for a, b in itertools.product(layouts, layouts):
        there, across, back = (tmp_path / f"{a}-{b}-{i}" for i in range(3))
        one = quantconvert.repack(tmp_path / "start", there, a)
        two = quantconvert.repack(there, across, b)
        for folder, plan in ((there, one.plan), (across, two.plan)):
            for module, w in weights(folder, plan).items():
                slack = LAYOUTS[plan.format].slack(scheme, "BF16") * float(expected[module].abs().max()) / 4
                assert torch.allclose(w, expected[module], rtol=0, atol=slack), (a, b, module)
        if not scheme.activations:  # other layouts do not keep the activations' part
            quantconvert.repack(across, back, first)
            again = read_tensors(back)
            assert set(again) == set(original)
            for key, tensor in original.items():
                # a scale that went through float16 comes back with the same value, in float16
                assert torch.equal(again[key].float(), tensor.float()), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("layout", "name"),
    [(f, s) for f in LAYOUTS for s in SCHEMES if not s.endswith("A8") or f == "compressed-tensors"],
)
def test_dequantize_equals_the_independent_decoder(source: Path, tmp_path: Path, layout: str, name: str, dtype):
    try:
        made = quantconvert.convert(source, tmp_path / "q", scheme=name, format=layout)
    except quantconvert.QuantConvertError:
        pytest.skip("the layout does not hold this scheme")
    quantconvert.dequantize(tmp_path / "q", tmp_path / "plain", dtype)
    plain, stored = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "q")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert set(plain) == set(read_tensors(source))
    for task in made.plan.quantized:
        module = task.source.name.removesuffix(".weight")
        assert task.scheme
        expected = decode(wide(stored), module, layout, task.scheme.num_bits, task.scheme.symmetric)
        assert torch.equal(plain[task.source.name], expected.to(getattr(torch, dtype)))
    for name_, tensor in read_tensors(source).items():
        if name_ not in {t.source.name for t in made.plan.quantized}:
            assert torch.equal(plain[name_], tensor)


def test_repack_mixed_precision_keeps_schemes(source: Path, tmp_path: Path):
    rules = ["*.down_proj=W8A16:g64", "*.o_proj=skip"]
    start = quantconvert.convert(source, tmp_path / "a", rules=rules, format="compressed-tensors")
    moved = quantconvert.repack(tmp_path / "a", tmp_path / "b", "gptq")
    again = quantconvert.repack(tmp_path / "b", tmp_path / "c", "rtn")
    assert start.plan.schemes == moved.plan.schemes == again.plan.schemes
    assert "+:.*layers\\.\\d+\\.mlp\\.down_proj$" in (moved.plan.quantization_config or {})["dynamic"]
    assert "-:.*layers\\.\\d+\\.self_attn\\.o_proj$" in (moved.plan.quantization_config or {})["dynamic"]


def test_repack_refuses_what_the_layout_cannot_hold(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "q", bits=8)
    with pytest.raises(quantconvert.UnsupportedError, match=r"awq holds 4 bits only, got 8: .* and 4 more"):
        quantconvert.repack(tmp_path / "q", tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_repack_refuses_scales_that_float16_cannot_hold(tmp_path: Path):
    tensors = llama_tensors(layers=1) | {"model.layers.0.mlp.up_proj.weight": weight(256, 128, scale=1e-7)}
    tensors["model.layers.0.mlp.gate_proj.weight"] = weight(256, 128, seed=5)
    source = write_checkpoint(tmp_path / "s", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    quantconvert.convert(source, tmp_path / "q", format="compressed-tensors")
    with pytest.raises(quantconvert.UnsupportedError, match=r"up_proj` has scales that torch\.float16 does not hold"):
        quantconvert.repack(tmp_path / "q", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_a_plain_checkpoint_is_refused(source: Path, tmp_path: Path):
    for action in (lambda: quantconvert.repack(source, tmp_path / "out", "gptq"),
                   lambda: quantconvert.dequantize(source, tmp_path / "out")):  # fmt: skip
        with pytest.raises(quantconvert.UnsupportedError, match=r"config\.json has no quantization_config"):
            action()


def test_tensors_that_contradict_the_config_are_refused(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "q", format="compressed-tensors")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(quantconvert.Refusal, match=r"expected shape \[128, 2\] for int4 g64 symmetric, got \[128, 1\]"):
        quantconvert.dequantize(tmp_path / "q", tmp_path / "out")


def test_int8_activations_are_said_without_touching_a_code(tmp_path: Path):
    """From GPTQ int8 per channel to W8A8. The original is float16, as GPTQ's scales are: the same arithmetic."""
    original = write_checkpoint(tmp_path / "in", llama_tensors(layers=1, dtype=torch.float16), ONE_LAYER)
    coded = quantconvert.convert(original, tmp_path / "gptq", scheme="W8A16:channel", format="gptq")
    moved = quantconvert.repack(tmp_path / "gptq", tmp_path / "w8a8", "compressed-tensors", activations="int8")
    direct = quantconvert.convert(original, tmp_path / "direct", scheme="W8A8")
    assert moved.plan.quantization_config == direct.plan.quantization_config
    assert set(moved.plan.schemes) == {Scheme(8, True, "channel", None, True)}
    found, expected = read_tensors(tmp_path / "w8a8"), read_tensors(tmp_path / "direct")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(coded.plan.quantized) == sum(tensor.dtype == torch.int8 for tensor in found.values()) == 7
    assert "repack SRC OUT --activations int8 --format" in (tmp_path / "w8a8" / "README.md").read_text()
    quantconvert.repack(tmp_path / "w8a8", tmp_path / "back", "gptq")
    again, once = read_tensors(tmp_path / "back"), read_tensors(tmp_path / "gptq")
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_int4_becomes_w4a8_with_one_key_more(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "gptq", scheme="W4A16:g64", format="gptq")
    plain = quantconvert.repack(tmp_path / "gptq", tmp_path / "w4a16", "compressed-tensors")
    acting = quantconvert.repack(tmp_path / "gptq", tmp_path / "w4a8", "compressed-tensors", activations="int8")
    assert set(acting.plan.schemes) == {Scheme(4, True, "group", 64, True)}
    found, expected = read_tensors(tmp_path / "w4a8"), read_tensors(tmp_path / "w4a16")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (group,) = (acting.plan.quantization_config or {})["config_groups"].values()
    (other,) = (plain.plan.quantization_config or {})["config_groups"].values()
    assert {key for key in group if group[key] != other[key]} == {"input_activations"}
    direct = quantconvert.plan(source, scheme="W4A8:g64").quantization_config
    assert acting.plan.quantization_config == direct


@pytest.mark.parametrize(
    ("scheme", "start", "layout", "said"),
    [
        (
            "W4A16_ASYM",
            "gptq",
            "compressed-tensors",
            r"int4 by group or channel \(W4A8\), not with int4 g128 asymmetric",
        ),
        ("W8A16:g64", "gptq", "compressed-tensors", r"\(W4A8\), not with int8 g64 symmetric"),
        ("W8A16_ASYM:channel", "gptq", "compressed-tensors", r"\(W4A8\), not with int8 per channel asymmetric"),
        ("W8A16:channel", "gptq", "rtn", "rtn is weight-only"),
    ],
)
def test_int8_activations_are_refused_with_the_reason(
    source: Path, tmp_path: Path, scheme: str, start: str, layout: str, said: str
):
    quantconvert.convert(source, tmp_path / "q", scheme=scheme, format=start)
    with pytest.raises(quantconvert.UnsupportedError, match=said):
        quantconvert.repack(tmp_path / "q", tmp_path / "out", layout, activations="int8")
    assert not (tmp_path / "out").exists()


def test_activations_of_another_kind_are_a_usage_error(source: Path, tmp_path: Path):
    with pytest.raises(quantconvert.UsageError, match="--activations: expected int8, got `int4`"):
        quantconvert.repack(source, tmp_path / "out", "rtn", activations="int4")  # type: ignore[arg-type]
