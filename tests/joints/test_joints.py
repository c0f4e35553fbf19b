"""What one file and one line are enough for: each toy converts, verifies, and is resumed after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantconvert
from quantconvert.events import Note
from quantconvert.layouts import LAYOUTS
from quantconvert.sources.steps import STEPS
from tests.builders import llama_tensors, read_tensors, weight, write_checkpoint
from tests.joints import encoding, kernel, layout, step
from tests.joints.table import TOYS
from tests.snapshots import digests


def source_of(name: str, folder: Path) -> Path:
    return encoding.write_source(folder) if name == "encoding" else write_checkpoint(folder, varied(), shards=2)


def varied() -> dict[str, torch.Tensor]:
    """A small Llama whose norms are not all alike."""
    tensors = llama_tensors()
    for i, name in enumerate(n for n in tensors if "layernorm" in n):
        tensors[name] = (weight(128, seed=i, dtype=torch.float32, scale=2).abs() + 0.1).to(torch.bfloat16)
    return tensors


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_converts_and_verifies(name: str, tmp_path: Path):
    source, out, toy = source_of(name, tmp_path / "in"), tmp_path / "out", TOYS[name]
    with toy.registered():
        quantconvert.convert(source, out, verify=True, **toy.options)
        found = quantconvert.verify(out, source)
        assert found.is_ok, found.findings
        assert len(found.errors) == 14
    report = json.loads((out / "quantconvert.json").read_text())
    assert report["job"]["method"] == toy.options.get("method", "rtn")
    assert report["job"]["steps"] == list(toy.options.get("steps", []))
    cut = tmp_path / "cut"
    with toy.registered():
        quantconvert.convert(source, cut, workers=1, memory_limit="12MB", **toy.options)
    assert digests(cut) == digests(out)


@pytest.mark.process
@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_resumed_after_a_kill(name: str, tmp_path: Path):
    source, whole, out, toy = source_of(name, tmp_path / "in"), tmp_path / "whole", tmp_path / "out", TOYS[name]
    options = toy.options | {"max_shard_size": "60KB", "workers": 1, "equalize": False}
    with toy.registered():
        quantconvert.convert(source, whole, **options)
    command = [sys.executable, "-m", "tests.joints.run", name, str(source), str(out), json.dumps(options), "9"]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not (out / "config.json").exists()
    said: list[str] = []
    with toy.registered():
        quantconvert.convert(
            source, out, report=lambda e: said.append(e.message) if isinstance(e, Note) else None, **options
        )
    assert any("continuing" in text for text in said), said
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("wrong", [layout.RoundedOffset(), layout.RoundedScale(), layout.SwappedPairs()], ids=repr)
def test_a_wrong_layout_is_found(wrong: layout.Biased, tmp_path: Path):
    """`verify` computes as an engine would, from what is stored."""
    source, out = write_checkpoint(tmp_path / "in"), tmp_path / "out"
    with LAYOUTS.added(wrong):
        with pytest.raises(quantconvert.VerificationError, match="14 findings"):
            quantconvert.convert(source, tmp_path / "no", format=wrong.name, group_size=32, verify=True)
        quantconvert.convert(source, out, format=wrong.name, group_size=32)
        found = quantconvert.verify(out, source)
    assert len(found.findings) == 14
    assert {finding.check for finding in found.findings} == {"values"}


def test_a_layout_with_a_bias_is_read_back(tmp_path: Path):
    source, out, plain = write_checkpoint(tmp_path / "in"), tmp_path / "out", tmp_path / "plain"
    with LAYOUTS.added(layout.TOY):
        quantconvert.convert(source, out, **TOYS["layout"].options)
        quantconvert.dequantize(out, plain, dtype="float32")
        quantconvert.convert(out, tmp_path / "again", format="rtn", bits=8, group_size=32, symmetric=False)
    stored, found = read_tensors(out), read_tensors(plain)
    for name in (n for n in found if "_proj" in n):
        stem = name.removesuffix("weight")
        scale, bias = (stored[stem + key].repeat_interleave(32, 1) for key in ("toy_scales", "toy_biases"))
        assert torch.equal(found[name], stored[stem + "codes"].float() * scale + bias)


def test_another_method_s_tolerance_is_asked(tmp_path: Path):
    source, out, toy = write_checkpoint(tmp_path / "in"), tmp_path / "out", TOYS["method"]
    with toy.registered():
        quantconvert.convert(source, out, **toy.options)
        assert quantconvert.verify(out, source).is_ok
        strict = quantconvert.verify(out, source, method="rtn")
    assert "a value lies" in strict.findings[0].message
    unknown = quantconvert.verify(out, source)
    assert unknown.findings[0].message == "names a method that is not known here: `toy-clip`"


def test_a_method_says_what_it_needs_and_supports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both are refused at plan time, together."""
    source, toy = write_checkpoint(tmp_path / "in"), TOYS["method"]
    monkeypatch.setattr("tests.joints.method.Clip.needs", "moments")
    with toy.registered(), pytest.raises(quantconvert.Refusal) as refused:
        quantconvert.plan(source, method="toy-clip", scheme="W8A16:tensor", format="compressed-tensors")
    texts = [str(error) for error in refused.value.errors]
    assert any("--method toy-clip: expected a source of the second moments" in text for text in texts), texts
    assert any("no codes for int8 per tensor symmetric (one scale a tensor is not clipped)" in t for t in texts), texts
    with toy.registered(), pytest.raises(quantconvert.UsageError, match="--method rtn needs nothing but the weights"):
        quantconvert.plan(source, **toy.options)


def test_what_a_method_holds_is_in_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, toy = write_checkpoint(tmp_path / "in"), TOYS["method"]
    with toy.registered():
        before = quantconvert.plan(source, **toy.options)
        monkeypatch.setattr("tests.joints.method.Clip.held", lambda self, scheme, columns: 1000 * columns)
        after = quantconvert.plan(source, **toy.options)
        most, mark = (max(task.peak_nbytes for task in plan.tasks) for plan in (after, before))
        with pytest.raises(quantconvert.UnsupportedError, match="at its peak"):
            quantconvert.plan(source, memory_limit=most - 1, **toy.options)
    assert 0 < most - mark <= 1000 * 256


def test_an_encoding_gives_its_values(tmp_path: Path):
    source, out, toy = encoding.write_source(tmp_path / "in"), tmp_path / "out", TOYS["encoding"]
    with toy.registered():
        quantconvert.dequantize(source, out, dtype="float32")
    for name, tensor in read_tensors(out).items():
        assert torch.equal(tensor.float(), encoding.expected()[name].float()), name


def test_steps_change_quantized_and_kept_tensors(tmp_path: Path):
    """What the columns take the norm gives: their product is what it was, and a norm is exact."""
    source, out, toy = write_checkpoint(tmp_path / "in", varied()), tmp_path / "out", TOYS["step"]
    plain = tmp_path / "plain"
    with toy.registered():
        plan = quantconvert.plan(source, **toy.options)
        quantconvert.convert(source, out, **toy.options)
    quantconvert.dequantize(out, plain, dtype="float32")
    before, after = varied(), read_tensors(plain)
    norm = "model.layers.0.input_layernorm.weight"
    factor = step.powers(before[norm])
    assert len(factor.unique()) > 3
    assert torch.equal(after[norm].float() * factor, before[norm].float())
    q = "model.layers.0.self_attn.q_proj.weight"
    expected = before[q].float() * factor
    assert (after[q] - expected).abs().max() < 0.51 * expected.abs().max() / 127
    assert "changed" in plan.accounts
    readers = [task for task in plan.tasks if any(ref.name == norm for ref in task.source.partners)]
    assert {t.source.name.split(".")[-2] for t in readers} == {"input_layernorm", "q_proj", "k_proj", "v_proj"}
    assert plan.digest != quantconvert.plan(source, scheme="W8A16:g32").digest


def test_a_step_that_mixes_rows(tmp_path: Path):
    source, out, toy = write_checkpoint(tmp_path / "in"), tmp_path / "out", TOYS["row step"]
    plain = tmp_path / "plain"
    with toy.registered():
        quantconvert.convert(source, out, **toy.options)
        peak = quantconvert.plan(source, **toy.options).peak_nbytes
    assert peak >= quantconvert.plan(source, scheme="W8A16:g32").peak_nbytes + 4 * 256 * 128
    quantconvert.dequantize(out, plain, dtype="float32")
    up = llama_tensors()["model.layers.0.mlp.up_proj.weight"].float()
    expected = torch.stack((up[::2] + up[1::2], up[::2] - up[1::2]), 1).view(up.shape)
    assert (read_tensors(plain)["model.layers.0.mlp.up_proj.weight"] - expected).abs().max() < 0.01


def test_the_order_of_steps_is_that_of_the_job(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", varied())
    with STEPS.added(step.TOY), STEPS.added(step.MIX):
        first = quantconvert.plan(source, steps=("toy-fold", "toy-mix"))
        second = quantconvert.plan(source, steps=("toy-mix", "toy-fold"))
    up = "model.layers.0.mlp.up_proj.weight"
    kinds = [[s.kind for t in plan.tasks if t.source.name == up for s in t.source.steps] for plan in (first, second)]
    assert kinds == [["toy-fold", "toy-butterfly"], ["toy-butterfly", "toy-fold"]]
    assert first.digest != second.digest
    with pytest.raises(quantconvert.UsageError, match="unknown step `nothing`"):
        quantconvert.plan(source, steps=("nothing",))


def test_the_kernel_is_what_ran(tmp_path: Path):
    source, toy = write_checkpoint(tmp_path / "in"), kernel.PackedInt4()
    options = TOYS["kernel"].options
    quantconvert.convert(source, tmp_path / "slow", **options)
    with TOYS["kernel"].registry.added(toy, first=True):
        quantconvert.convert(source, tmp_path / "fast", **options)
    assert toy.num_calls == 14
    assert digests(tmp_path / "fast") == digests(tmp_path / "slow")
