"""Sources that are quantized already: what has to be asked for, what stays, what is counted, and what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.planning.tasks import role_of
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, write_checkpoint
from tests.coded import awq_model, gptq_model, kimi_model
from tests.inputs import LAYER, Model, attention, config, fp8_model, fused_model, mxfp4_model, plain_rest, turned_model

pytestmark = pytest.mark.usefixtures("toy_families")

MODELS: dict[str, Callable[[], Model]] = {
    "plain": lambda: Model(plain_rest(64) | attention(), config("toy_dense")),
    "fp8": fp8_model,
    "mxfp4": mxfp4_model,
    "kimi": kimi_model,
    "awq": awq_model,
    "gptq": lambda: gptq_model(4, "gptq", True, False),
    "gptq int8": lambda: gptq_model(8, "gptq", False, True),
    "turned": turned_model,
    "fused": lambda: fused_model(False),
    "fused turned": lambda: fused_model(True),
}
STORED_BITS = {"fp8": 8, "mxfp4": 4, "kimi": 4, "awq": 4, "gptq": 4, "gptq int8": 8}


def plan_of(folder: Path, kind: str, **options: Any) -> quantconvert.Plan:
    return quantconvert.plan(MODELS[kind]().write(folder), group_size=32, **options)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_as_many_bits_or_fewer_must_be_asked_for(tmp_path: Path, kind: str, bits: int):
    source = MODELS[kind]().write(tmp_path / "model")
    stored = STORED_BITS.get(kind)
    if stored is None or bits > stored:
        made = quantconvert.plan(source, bits=bits, group_size=32)
        assert made.quantized
        assert not [note for note in made.notes if "--requantize" in note]
        return
    with pytest.raises(quantconvert.UnsupportedError) as info:
        quantconvert.plan(source, bits=bits, group_size=32)
    made = quantconvert.plan(source, bits=bits, group_size=32, requantize=True)
    count, method = len(made.quantized), made.source_format
    assert info.value.message.startswith(
        f"the source is already quantized (`{method}`, {stored} bits): {count} weights would be quantized again to as "
        "many bits or fewer: `"
    )
    assert (info.value.hint or "").startswith("--requantize does that (both errors add up)")
    (note,) = [note for note in made.notes if "--requantize" in note]
    assert note == (
        f"--requantize: {count} weights are decoded from {method} ({stored} bits) and quantized again; the errors of "
        "both add up"
    )


def test_one_rule_that_narrows_is_enough_to_ask(tmp_path: Path):
    options: dict[str, Any] = {"bits": 8, "rules": ["*.experts.*=W4A16:g32"]}
    with pytest.raises(quantconvert.UnsupportedError, match=r"`compressed-tensors`, 4 bits\): 9 weights"):
        plan_of(tmp_path / "model", "kimi", **options)


def test_what_the_source_left_alone_stays(tmp_path: Path):
    made = plan_of(tmp_path / "model", "kimi", bits=8)
    kept = {task.source.name: task for task in made.kept if task.reason == "plain"}
    assert set(kept) == {f"{LAYER}.self_attn.{x}_proj.weight" for x in "qkvo"}
    assert {task.evidence for task in kept.values()} == {
        "source is quantized by compressed-tensors, and left this one alone"
    }
    assert {role_of(task) for task in kept.values()} == {"linear"}
    assert "self_attn" in json.dumps((made.quantization_config or {})["ignore"])


def test_what_the_source_left_alone_is_quantized_where_a_rule_names_it(tmp_path: Path):
    made = plan_of(tmp_path / "model", "kimi", bits=8, rules=["*.self_attn.*=W8A16:g32"])
    assert not [task for task in made.kept if task.reason == "plain"]
    assert len(made.quantized) == 9 + 4
    some = plan_of(tmp_path / "model2", "kimi", bits=8, rules=["*.o_proj=W8A16:g32"])
    assert {task.source.name for task in some.kept if task.reason == "plain"} == {
        f"{LAYER}.self_attn.{x}_proj.weight" for x in "qkv"
    }


# Strict


def test_strict_refuses_what_no_table_says(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model")
    quantconvert.plan(source, strict=True)
    tensors = llama_tensors(layers=1) | {"model.layers.0.mlp.odd_gate.weight": torch.zeros(64, 100)}
    odd = write_checkpoint(tmp_path / "odd", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    quantconvert.plan(odd, on_indivisible="skip")
    with pytest.raises(quantconvert.UnsupportedError) as info:
        quantconvert.plan(odd, on_indivisible="skip", strict=True)
    assert info.value.message.startswith("--strict: 1 linear weights would stay in high precision for reasons outside")
    assert "(indivisible): `model.layers.0.mlp.odd_gate`" in info.value.message
    assert quantconvert.plan(odd, ignore=["*.odd_gate"], strict=True).quantized


def test_strict_refuses_what_the_source_left_alone(tmp_path: Path):
    with pytest.raises(quantconvert.UnsupportedError, match=r"--strict: 4 linear weights .* \(plain\): "):
        plan_of(tmp_path / "model", "kimi", bits=8, strict=True)
    assert plan_of(tmp_path / "model2", "kimi", bits=8, strict=True, ignore=["*.self_attn.*"]).quantized


# Accounts


@pytest.mark.parametrize("kind", MODELS)
def test_accounts_add_up(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    made = quantconvert.plan(source, bits=8, group_size=32, requantize=True)
    values = made.to_json()
    assert sum(values["accounts"].values()) == values["num_tensors"] == len(model.tensors)
    read = [name for row in values["tensors"] for name in row["inputs"]] + list(values["dropped_tensors"])
    assert set(read) == set(model.tensors)
    partners = {"fp8": 7, "kimi": 9 * 2, "awq": 7 * 2, "gptq": 7 * 3, "gptq int8": 7 * 3, "mxfp4": 2}
    assert values["accounts"].get("partners", 0) == partners.get(kind, 0)
    assert "dropped" not in values["accounts"]


def test_accounts_of_decoded_and_dropped(tmp_path: Path):
    model = fp8_model()
    model.tensors[f"{LAYER}.self_attn.k_scale"] = torch.tensor(1.0)
    source = model.write(tmp_path / "model")
    made = quantconvert.plan(source, bits=8, group_size=32, requantize=True, ignore=["*.self_attn.*"])
    assert made.accounts == {"copied": 3, "decoded": 4, "quantized": 3, "partners": 7, "dropped": 1}


# Explained


@pytest.mark.process
def test_explain_prints_every_tensor(tmp_path: Path):
    model = fp8_model()
    dropped = f"{LAYER}.self_attn.k_scale"
    model.tensors[dropped] = torch.tensor(1.0)
    model.config["model_type"] = "llama"
    model.tensors["model.norm.weight"] = torch.ones(160)
    source = model.write(tmp_path / "model")
    command = [sys.executable, "-m", "quantconvert", "plan", str(source), "--explain", "--verbose", "--bits", "8"]
    command += ["--group-size", "32", "--requantize", "--ignore", "*.o_proj"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert set(model.tensors) - {name for name in model.tensors if name.endswith("_inv")} <= set(rows)
    assert rows["tensor"].split() == ["tensor", "shape", "dtype", "role", "decision", "rule"]
    up, kept = rows[f"{LAYER}.mlp.up_proj.weight"], rows[f"{LAYER}.self_attn.o_proj.weight"]
    assert "224x160" in up
    assert "F8_E4M3 as F32" in up
    assert "int8 g32" in up
    assert "family llama" in up
    assert "keep: ignored" in kept
    assert "--ignore *.o_proj" in kept
    assert "keep: norm" in rows[f"{LAYER}.input_layernorm.weight"]
    assert "drop" in rows[dropped]
    assert "activation scale" in rows[dropped]
    assert "19 in the source: " in rows["tensors"]
    assert "--requantize: 6 weights are decoded from fp8" in done.stdout


# Sub-folders


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    write_checkpoint(
        tmp_path / "repo" / "text_encoder", llama_tensors(layers=1), LLAMA_CONFIG | {"num_hidden_layers": 1}
    )
    (tmp_path / "repo" / "model_index.json").write_text("{}")
    (tmp_path / "repo" / "text_encoder" / "tokenizer.json").write_text("{}")
    return tmp_path / "repo"


@pytest.mark.parametrize("folder", ["text_encoder", "text_encoder/", "./text_encoder"])
def test_subfolder_is_a_checkpoint_of_its_own(nested: Path, tmp_path: Path, folder: str):
    result = quantconvert.convert(nested, tmp_path / "out", subfolder=folder)
    quantconvert.convert(nested / "text_encoder", tmp_path / "direct")
    one, other = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "direct")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "direct").iterdir()
    }
    assert result.plan.checkpoint.location == f"{nested}/text_encoder"
    assert quantconvert.inspect(nested, subfolder=folder).num_tensors == len(llama_tensors(layers=1))
    names = {name for name, _ in quantconvert.iter_quantized(nested, subfolder=folder, format="rtn")}
    assert f"{LAYER}.mlp.up_proj.weight" in names


@pytest.mark.parametrize("folder", ["..", "../repo/text_encoder", "text_encoder/../..", "/etc", ".", "", "a/../../b"])
def test_subfolder_outside_the_source(nested: Path, folder: str):
    with pytest.raises(quantconvert.UsageError) as info:
        quantconvert.plan(nested, subfolder=folder)
    assert info.value.message == f"--subfolder: expected a folder inside the source, got `{folder}`"


def test_subfolder_that_is_not_there(nested: Path):
    with pytest.raises(quantconvert.CheckpointError) as info:
        quantconvert.plan(nested, subfolder="text_encoder_2")
    assert info.value.message == f"`{nested}` has no folder `text_encoder_2`"
    assert info.value.hint == "folders with a config.json: text_encoder"
