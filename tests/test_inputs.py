"""float8, MXFP4, transposed and fused weights are read as what their owners' formulas say, from whichever file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.planning import memory
from tests.builders import decode_compressed_tensors, read_tensors, weight
from tests.inputs import (
    E4M3,
    FP8,
    LAYER,
    H,
    I,
    Model,
    decoded,
    fp8_model,
    fused_fp8_model,
    fused_model,
    mxfp4_model,
    mxfp4_values,
    random_bytes,
    turned_model,
)

pytestmark = pytest.mark.usefixtures("toy_families")
PARTNERS = ("_scale_inv", "_scale", "_scales")


def check_dequantized(model: Model, source: Path, out: Path) -> None:
    """Quantized weights are the formula's, rounded once to float32; the others are the stored bytes."""
    quantconvert.dequantize(source, out, "float32")
    found = read_tensors(out)
    partners = {name for name in model.tensors if name.endswith(PARTNERS)}
    assert set(found) == set(model.tensors) - partners
    for name, tensor in found.items():
        if name in model.expected:
            assert torch.equal(tensor, model.expected[name].float()), name
        else:
            assert torch.equal(tensor, model.tensors[name]), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("case", FP8)
def test_fp8_is_the_product_of_code_and_scale(tmp_path: Path, case: str):
    model = fp8_model(**FP8[case])
    check_dequantized(model, model.write(tmp_path / "model"), tmp_path / "out")


def test_exponents_at_their_limits(tmp_path: Path):
    """A scale of 2^-127 times subnormal codes is a float32 subnormal, or rounds to zero; nothing is flushed early."""
    model = fp8_model(scale="U8")
    name = f"{LAYER}.mlp.up_proj.weight"
    exponents = torch.tensor([[0, 1], [127, 246]], dtype=torch.uint8)
    model.tensors[f"{name}_scale_inv"] = exponents
    value = torch.pow(2.0, exponents.double() - 127).repeat_interleave(128, 0)[:224].repeat_interleave(128, 1)[:, :160]
    model.expected[name] = model.tensors[name].double() * value
    check_dequantized(model, model.write(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("action", ["dequantize", "convert"])
def test_nan_codes_of_fp8_are_refused(tmp_path: Path, code: int, action: str):
    model = fp8_model()
    name = f"{LAYER}.mlp.up_proj.weight"
    model.tensors[name].view(torch.uint8)[200, 150] = code
    source = model.write(tmp_path / "model")
    options: dict[str, Any] = {"group_size": 32, "requantize": True} if action == "convert" else {}
    with pytest.raises(quantconvert.CheckpointError, match=rf"`{name}` .* holds 1 NaN, first at \[200, 150\]"):
        getattr(quantconvert, action)(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_kept_nan_codes_of_fp8_are_decoded(tmp_path: Path):
    """--nan-policy keep leaves the weight, and what is fused with it, as plain floats: NaN and all."""
    model = fp8_model()
    name = f"{LAYER}.mlp.up_proj.weight"
    model.tensors[name].view(torch.uint8)[200, 150] = 0x7F
    source = model.write(tmp_path / "model")
    quantconvert.convert(source, tmp_path / "out", group_size=32, requantize=True, nan_policy="keep")
    found = read_tensors(tmp_path / "out")
    assert found[name].isnan().nonzero().tolist() == [[200, 150]]
    sibling = f"{LAYER}.mlp.gate_proj.weight"
    assert torch.equal(found[sibling], model.expected[sibling].float())


def test_activation_scales_are_dropped_with_a_reason(tmp_path: Path):
    model = fp8_model("[]", suffix="_scale")
    extra = [f"{LAYER}.self_attn.{tail}" for tail in ("k_scale", "v_scale", "q_proj.input_scale", "k_proj.k_scale")]
    model.tensors |= {name: torch.tensor(0.5) for name in extra}
    source = model.write(tmp_path / "model")
    result = quantconvert.convert(source, tmp_path / "out", group_size=32, requantize=True)
    dropped = result.plan.to_json()["dropped_tensors"]
    assert dropped == dict.fromkeys(extra, "activation scale of the source's own quantization (`fp8`)")
    assert not set(extra) & set(read_tensors(tmp_path / "out"))


def test_activation_scales_of_a_plain_checkpoint_are_not_dropped(tmp_path: Path):
    model = turned_model()
    model.tensors[f"{LAYER}.self_attn.k_scale"] = torch.tensor(0.5)
    quantconvert.convert(model.write(tmp_path / "model"), tmp_path / "out", group_size=32)
    assert f"{LAYER}.self_attn.k_scale" in read_tensors(tmp_path / "out")


def test_empty_float8_is_refused(tmp_path: Path):
    model = fp8_model()
    name = f"{LAYER}.mlp.up_proj.weight"
    model.tensors |= {name: torch.empty(0, 160, dtype=E4M3), f"{name}_scale_inv": torch.empty(0, 2)}
    with pytest.raises(quantconvert.CheckpointError, match=rf"`{name}` .*expected a float8 matrix, got \[0, 160\]"):
        quantconvert.dequantize(model.write(tmp_path / "model"), tmp_path / "out")


# MXFP4


def test_mxfp4_experts_are_the_formula_s(tmp_path: Path):
    model = mxfp4_model()
    source = model.write(tmp_path / "model")
    found = decoded(source, group_size=32)
    assert set(found) == set(model.expected)
    for name, w in found.items():
        assert torch.equal(w, model.expected[name].float()), name


def test_every_nibble_and_the_smallest_scales(tmp_path: Path):
    model = mxfp4_model()
    name = f"{LAYER}.mlp.experts.down_proj"
    model.tensors[f"{name}_blocks"][1, 0, 0] = torch.arange(16, dtype=torch.uint8) * 17
    model.tensors[f"{name}_blocks"][1, 1, 0] = torch.arange(16, dtype=torch.uint8) * 16 + 3
    model.tensors[f"{name}_scales"][1, :4, 0] = torch.tensor([127, 128, 0, 1], dtype=torch.uint8)
    row = decoded(model.write(tmp_path / "model"), group_size=32)[f"{LAYER}.mlp.experts.1.down_proj.weight"]
    signs = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert row[0, :32].tolist() == [value for value in signs for _ in range(2)]
    assert row[1, :32].tolist() == [2 * value for high in signs for value in (1.5, high)]
    values = mxfp4_values(model.tensors[f"{name}_blocks"], model.tensors[f"{name}_scales"])[1].float()
    assert torch.equal(row, values)
    assert row[2, :32].abs().max() <= 6 * 2.0**-127


@pytest.mark.parametrize(("scale", "nibbles", "what"), [(255, 0x22, "NaN"), (255, 0, "NaN"), (254, 0x77, "Inf")])
def test_scales_that_are_no_number_are_refused(tmp_path: Path, scale: int, nibbles: int, what: str):
    model = mxfp4_model()
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    model.tensors[f"{name}_scales"][2, 11, 1] = scale  # an odd row: up_proj's row 5
    model.tensors[f"{name}_blocks"][2, 11, 1] = nibbles
    source = model.write(tmp_path / "model")
    message = rf"experts\.2\.up_proj\.weight` .* holds 32 {what}, first at \[5, 32\]"
    with pytest.raises(quantconvert.CheckpointError, match=message):
        quantconvert.convert(source, tmp_path / "out", group_size=32, requantize=True)


def test_the_largest_scale_is_a_number(tmp_path: Path):
    model = mxfp4_model()
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    model.tensors[f"{name}_scales"][0, 0, 0] = 254
    model.tensors[f"{name}_blocks"][0, 0, 0] = 0x22
    found = decoded(model.write(tmp_path / "model"), group_size=32)[f"{LAYER}.mlp.experts.0.gate_proj.weight"]
    assert found[0, :32].tolist() == [2.0**127] * 32


def test_biases_and_router_follow_the_experts(tmp_path: Path):
    model = mxfp4_model()
    quantconvert.convert(model.write(tmp_path / "model"), tmp_path / "out", group_size=32, requantize=True)
    found, stem = read_tensors(tmp_path / "out"), f"{LAYER}.mlp.experts"
    for e in range(3):
        bias = model.tensors[f"{stem}.gate_up_proj_bias"][e]
        assert torch.equal(found[f"{stem}.{e}.gate_proj.bias"], bias[0::2])
        assert torch.equal(found[f"{stem}.{e}.up_proj.bias"], bias[1::2])
        assert torch.equal(found[f"{stem}.{e}.down_proj.bias"], model.tensors[f"{stem}.down_proj_bias"][e])
    assert not [name for name in found if name.endswith(("_bias", "_blocks", "_scales"))]
    assert torch.equal(found[f"{LAYER}.mlp.router.weight"], model.tensors[f"{LAYER}.mlp.router.weight"])


def test_mxfp4_without_a_table_is_refused_not_copied(tmp_path: Path):
    model = mxfp4_model(model_type="an_unknown_moe")
    with pytest.raises(quantconvert.UnsupportedError, match="fused experts are quantized in the source and would be"):
        quantconvert.plan(
            model.write(tmp_path / "model"),
            group_size=32,
            requantize=True,
            rules=["re:.*[qkv]_proj=W8A16:g32"],
            allow_kept_experts=True,
        )


def test_mxfp4_becomes_nvfp4_without_loss(tmp_path: Path):
    """Each value is the same, under scales of NVFP4: a block's own power of two, halved where that fills the codes."""
    model = mxfp4_model()
    for name, scales in model.tensors.items():
        if name.endswith("_scales"):
            scales.copy_(118 + scales % 12)
    experts = f"{LAYER}.mlp.experts"
    for name in ("gate_up_proj", "down_proj"):
        values = mxfp4_values(model.tensors[f"{experts}.{name}_blocks"], model.tensors[f"{experts}.{name}_scales"])
        for e in range(len(values)):
            parts = {"gate_proj": values[e, 0::2], "up_proj": values[e, 1::2]}
            for projection, w in parts.items() if name == "gate_up_proj" else [("down_proj", values[e])]:
                model.expected[f"{experts}.{e}.{projection}.weight"] = w
    source = model.write(tmp_path / "model")
    options: dict[str, Any] = {"scheme": "NVFP4A16", "requantize": True, "rules": [r"re:.*self_attn.*=skip"]}
    quantconvert.convert(source, tmp_path / "out", verify=True, **options)
    stored, table = read_tensors(tmp_path / "out"), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).double()
    modules = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    assert {f"{module}.weight" for module in modules} == {name for name in model.expected if ".experts." in name}
    for module in modules:
        packed, scale = stored[f"{module}.weight_packed"], stored[f"{module}.weight_scale"].double()
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
        values = (1 - 2 * (codes >> 3)) * table[codes & 7] * scale.repeat_interleave(16, 1)
        assert torch.equal(
            values / stored[f"{module}.weight_global_scale"].double(), model.expected[f"{module}.weight"]
        )


# Stored in another shape


@pytest.mark.parametrize("kind", ["fused", "fused turned", "fused interleaved", "fused fp8", "turned"])
def test_weights_are_told_apart(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    found = decoded(model.write(tmp_path / "model"), group_size=32)
    assert set(found) == set(model.expected)
    assert all(torch.equal(w, model.expected[name].float()) for name, w in found.items())


def test_kept_fused_and_turned_weights_stay_as_stored(tmp_path: Path):
    for i, (model, ignore) in enumerate(((fused_model(True), "*.experts.*"), (turned_model(), "*.o_proj"))):
        source = model.write(tmp_path / f"model{i}")
        quantconvert.convert(source, tmp_path / f"out{i}", group_size=32, ignore=[ignore])
        found = read_tensors(tmp_path / f"out{i}")
        names = [name for name in model.tensors if "experts" in name or (i and "o_proj" in name)]
        assert names
        assert all(torch.equal(found[name], model.tensors[name]) for name in names)


# All of them: conversion, files, tiles and ranks

MODELS: dict[str, Any] = {
    "fp8": fp8_model,
    "fp8 channel": lambda: fp8_model("[O]"),
    "fp8 odd blocks": lambda: fp8_model(block=(48, 80)),
    "mxfp4": mxfp4_model,
    "turned": turned_model,
    "fused": lambda: fused_model(False),
    "fused turned": lambda: fused_model(True),
    "fused interleaved": lambda: fused_model(True, interleaved=True),
    "fused fp8": fused_fp8_model,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_conversion_stays_within_half_a_step(tmp_path: Path, kind: str, bits: int):
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    options: dict[str, Any] = {"bits": bits, "group_size": 32, "symmetric": True, "format": "compressed-tensors"}
    quantconvert.convert(source, tmp_path / "out", requantize=True, **options)
    stored = read_tensors(tmp_path / "out")
    assert {name.removesuffix("_packed") for name in stored if name.endswith("_packed")} == set(model.expected)
    for name, expected in model.expected.items():
        module = name.removesuffix(".weight")
        step = stored[f"{module}.weight_scale"].double().repeat_interleave(32, 1)
        error = (decode_compressed_tensors(stored, module, bits).double() - expected).abs() / step
        assert error.max() <= 0.5 + 1e-4, name


def converted(source: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    quantconvert.convert(source, out, group_size=32, requantize=True, **options)
    return read_tensors(out)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "gptq"])
def test_tiles_and_slabs_do_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, format: str):
    """Slabs smaller than a tile, and such as hold several of them."""
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    whole = converted(source, tmp_path / "whole", format=format)
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 1500)
    for slab in (3000, 20_000):
        monkeypatch.setattr(memory, "MAX_SLAB_NBYTES", slab)
        plan = quantconvert.plan(source, group_size=32, requantize=True, format=format)
        task = max(plan.quantized, key=lambda task: task.num_elements)
        rows, columns = task.source.shape
        assert memory.cut(task.source, (rows, columns), 0, 8, plan.execution).tile_rows * 3 <= rows
        assert plan.execution.slab_nbytes == slab
        assert_same(converted(source, tmp_path / f"tiled{slab}", format=format), whole)


@pytest.mark.parametrize("kind", ["fp8", "fp8 channel", "mxfp4"])
def test_partners_may_lie_in_other_files(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    apart = model.write(tmp_path / "apart", split=PARTNERS)
    assert len(list(apart.glob("*.safetensors"))) == 2
    whole = converted(model.write(tmp_path / "one"), tmp_path / "a")
    assert_same(converted(apart, tmp_path / "b"), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ignored_fp8_comes_out_plain(tmp_path: Path, dtype: str):
    model = fp8_model()
    model.config["dtype"] = dtype
    pattern = r"re:.*self_attn\..*"
    found = converted(model.write(tmp_path / "model"), tmp_path / "out", ignore=[pattern])
    for name in (name for name in model.expected if "self_attn" in name):
        assert torch.equal(found[name], model.expected[name].float().to(getattr(torch, dtype))), name
    assert not [name for name in found if name.endswith("_scale_inv")]
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "self_attn" in json.dumps(ignored)


def test_mxfp4_in_two_dimensions_is_decoded_where_it_is_ignored(tmp_path: Path):
    """Not gpt-oss's own, but the pair of names means the same for one matrix."""
    model = Model({f"{LAYER}.mlp.norm.weight": weight(H)}, mxfp4_model().config)
    name = f"{LAYER}.mlp.up_proj.weight"
    model.tensors |= {
        f"{name}_blocks": random_bytes(I, 2, 16, seed=1),
        f"{name}_scales": random_bytes(I, 2, seed=2) // 2,
        f"{LAYER}.mlp.down_proj.weight": weight(H, I),
    }
    source = model.write(tmp_path / "model")
    found = converted(source, tmp_path / "out", ignore=["*.up_proj"], rules=["*.down_proj=W8A16:g32"])
    values = mxfp4_values(model.tensors[f"{name}_blocks"], model.tensors[f"{name}_scales"])
    assert torch.equal(found[name], values.float())


@pytest.mark.parametrize("kind", MODELS)
def test_ranks_read_their_slice(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    options: dict[str, Any] = {"bits": 8, "group_size": 16, "format": "rtn", "requantize": True}
    whole = dict(quantconvert.iter_quantized(source, **options))
    ranks = [dict(quantconvert.iter_quantized(source, tp_rank=r, tp_size=2, **options)) for r in range(2)]
    for name, tensor in whole.items():
        parts = [rank[name] for rank in ranks]
        module = name.rpartition(".")[0]
        if f"{module}.weight" not in model.expected or name.endswith(".bias"):
            assert all(torch.equal(part, tensor) for part in parts), name
        else:
            joined = torch.cat(parts, dim=1 if module.endswith(("o_proj", "down_proj")) else 0)
            assert torch.equal(joined, tensor), name
            assert parts[0].numel() * 2 == tensor.numel()
