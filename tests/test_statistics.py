"""Statistics files: what is read of them, what is refused, and the scales that W8A8_STATIC takes from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert import CheckpointError, Refusal, UnsupportedError, UsageError
from quantconvert.checkpoint import LocalFolder, load_checkpoint, reader_of
from quantconvert.statistics import fingerprint, open_statistics
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, write_checkpoint
from tests.interrupted import interrupt
from tests.snapshots import digests
from tests.statistics import llama_statistics, write_statistics

LAYER = "model.layers.0"
STATIC: dict[str, Any] = {"scheme": "W8A8_STATIC"}


def test_what_is_read(tmp_path: Path):
    found = open_statistics(llama_statistics(tmp_path / "s.safetensors"))
    assert found.num_tokens == 256
    for module in (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"):
        ref = found.second_moment(module)
        assert ref is not None
        assert ref.name == f"{LAYER}.self_attn.q_proj.second_moment"
        assert torch.tensor(list(found.values(ref))).equal(torch.linspace(0, 1, 128).square() / 4)
    largest = found.max(f"{LAYER}.mlp.down_proj")
    assert largest is not None
    assert list(found.values(largest)) == [4.0]
    assert found.channel_max(f"{LAYER}.mlp.up_proj") == found.channel_max(f"{LAYER}.mlp.gate_proj")
    assert found.moments(f"{LAYER}.mlp.up_proj") is None
    assert found.max("lm_head") is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no statistics": ({"inputs": ""}, "holds no statistics: its metadata do not say whose inputs they are"),
    "inputs are no object": ({"inputs": "[]"}, "holds no statistics"),
    "no count": ({"num_tokens": "many"}, "holds no statistics"),
    "a vector is missing": ({"change": {"m.channel_max": None}}, "`m.channel_max` is missing, the input of `m`"),
    "another width": ({"change": {"m.channel_max": torch.ones(3)}}, r"expected F32 \[4\], got F32 \[3\]"),
    "another dtype": ({"change": {"m.max": torch.ones(1).half()}}, r"expected F32 \[1\], got F16 \[1\]"),
    "moments not square": ({"change": {"m.moments": torch.ones(4, 3)}}, r"expected F32 \[4, 4\], got F32 \[4, 3\]"),
    "unknown kind": ({"change": {"m.mean": torch.ones(4)}}, "expected one of second_moment, channel_max, max, moments"),
    "NaN": ({"change": {"m.second_moment": torch.full((4,), torch.nan)}}, "expected finite numbers of at least 0"),
    "infinite": ({"change": {"m.max": torch.tensor([torch.inf])}}, "expected finite numbers of at least 0"),
    "negative": ({"change": {"m.channel_max": -torch.ones(4)}}, "expected finite numbers of at least 0"),
}


@pytest.mark.parametrize(("how", "message"), WRONG.values(), ids=WRONG)
def test_files_that_are_refused(how: dict[str, Any], message: str, tmp_path: Path):
    path = write_statistics(tmp_path / "s.safetensors", {"m": 4}, **how)
    with pytest.raises(CheckpointError, match=message):
        open_statistics(path)


def test_a_file_that_is_not_there(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"--statistics: cannot open `no\.safetensors`: No such file") as caught:
        quantconvert.plan(source, statistics=str(tmp_path / "no.safetensors"))
    assert caught.value.hint is not None
    assert "quantconvert observe" in caught.value.hint


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path):
    found = open_statistics(llama_statistics(tmp_path / "s.safetensors"))
    llama_statistics(tmp_path / "s.safetensors", layers=1)
    ref = found.max(f"{LAYER}.mlp.down_proj")
    assert ref is not None
    with pytest.raises(CheckpointError, match="changed after they were opened"):
        found.values(ref)


def test_statistics_of_another_model(tmp_path: Path):
    """Type, names and widths: all of it at once."""
    source = write_checkpoint(tmp_path / "in")
    path = llama_statistics(tmp_path / "s.safetensors", layers=3, intermediate=512, model_type="qwen2")
    with pytest.raises(Refusal) as caught:
        quantconvert.plan(source, statistics=str(path), **STATIC)
    messages = [error.message for error in caught.value.errors]
    assert [error.exit_code for error in caught.value.errors] == [3, 3, 3]
    assert "of another model: expected model_type `llama`, got `qwen2`" in messages[0]
    assert "7 modules that the checkpoint does not have: `model.layers.2.self_attn.q_proj`" in messages[1]
    assert f"`{LAYER}.mlp.down_proj`: expected 256 columns, got 512" in messages[2]


def test_static_scales_need_statistics(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(UsageError, match="W8A8_STATIC stores the scale of each layer's input") as caught:
        quantconvert.plan(source, **STATIC)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("quantconvert observe SRC STATS.safetensors --text FILE")


def test_static_scales_need_every_input(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    path = llama_statistics(tmp_path / "s.safetensors", layers=1)
    with pytest.raises(UnsupportedError, match=r"do not have the inputs of 7 modules .*`model.layers.1") as caught:
        quantconvert.plan(source, statistics=str(path), **STATIC)
    assert caught.value.hint == "--rule 'PATTERN=W8A8' finds the scales of these while the model runs"
    plan = quantconvert.plan(source, statistics=str(path), rules=["*.layers.1.*=W8A8"], **STATIC)
    assert {scheme.label: count for scheme, count in plan.schemes.items()} == {
        "int8 per channel symmetric, static int8 activations": 7,
        "int8 per channel symmetric, int8 activations": 7,
    }


@pytest.mark.parametrize("layout", ["awq", "gptq", "rtn"])
def test_layouts_that_hold_no_scales_of_inputs(layout: str, tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    path = llama_statistics(tmp_path / "s.safetensors")
    with pytest.raises((UnsupportedError, Refusal)):
        quantconvert.plan(source, statistics=str(path), format=layout, **STATIC)


def scales_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n.removesuffix(".input_scale"): t for n, t in read_tensors(folder).items() if n.endswith(".input_scale")}


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_STATIC:tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_scales_that_are_written(scheme: str, dtype: torch.dtype, tmp_path: Path):
    """max |x| / 127.5, rounded once; the same number in all that engines load as one; epsilon for an input of zeros."""
    source = write_checkpoint(tmp_path / "in", llama_tensors(dtype=dtype))
    zero = {f"{LAYER}.self_attn.o_proj.max": torch.zeros(1)}
    path = llama_statistics(tmp_path / "s.safetensors", change=zero)
    quantconvert.convert(source, tmp_path / "out", scheme=scheme, statistics=str(path), verify=True)
    found = scales_of(tmp_path / "out")
    assert len(found) == 14
    inputs = json.loads(open_metadata(path)["inputs"])
    keys = list(dict.fromkeys(inputs.values()))
    for module, scale in found.items():
        largest = keys.index(inputs[module]) + 1.0
        expected = torch.tensor([largest / 127.5], dtype=torch.float64).float().to(dtype)
        if module == f"{LAYER}.self_attn.o_proj":
            expected = torch.tensor([torch.finfo(dtype).eps], dtype=dtype)
        assert scale.dtype == dtype
        torch.testing.assert_close(scale, expected, rtol=torch.finfo(dtype).eps, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False,
    }  # fmt: skip
    assert group["format"] == config["format"] == "int-quantized"
    assert quantconvert.verify(tmp_path / "out", source).is_ok
    report = json.loads((tmp_path / "out" / "quantconvert.json").read_text())
    assert report["statistics"]["num_tokens"] == 256
    assert report["job"]["statistics"] == report["statistics"]["file"] == "s.safetensors"
    texts = [(tmp_path / "out" / name).read_text() for name in ("README.md", "quantconvert.json")]
    assert not any(str(tmp_path) in text for text in texts)
    assert "--statistics s.safetensors" in texts[0]


def open_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_fused_layers_share_the_largest(tmp_path: Path):
    """Statistics of another maker may have an input for each; engines take one scale."""
    source = write_checkpoint(tmp_path / "in", llama_tensors(layers=1), LLAMA_CONFIG | {"num_hidden_layers": 1})
    names = [f"{LAYER}.self_attn.{n}_proj" for n in "qkvo"] + [f"{LAYER}.mlp.{n}_proj" for n in ("gate", "up", "down")]
    path = write_statistics(tmp_path / "s.safetensors", {n: 256 if "down" in n else 128 for n in names})
    quantconvert.convert(source, tmp_path / "out", statistics=str(path), **STATIC)
    scales = scales_of(tmp_path / "out")
    found = {name.rpartition(".")[2]: round(float(scale) * 127.5) for name, scale in scales.items()}
    assert found == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 4, "gate_proj": 6, "up_proj": 6, "down_proj": 7}


def test_float16_must_hold_the_scales(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", llama_tensors(dtype=torch.float16))
    change = {f"{LAYER}.mlp.down_proj.max": torch.tensor([9e6])}
    path = llama_statistics(tmp_path / "s.safetensors", change=change)
    with pytest.raises(UnsupportedError, match="float16 does not hold the scales of 1 inputs"):
        quantconvert.plan(source, statistics=str(path), **STATIC)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("static")
    source = write_checkpoint(work / "in")
    path = llama_statistics(work / "s.safetensors")
    quantconvert.convert(source, work / "out", statistics=str(path), **STATIC)
    return source, work / "out"


def change_scale(folder: Path, value: float) -> None:
    from safetensors.torch import save_file

    tensors = read_tensors(folder)
    tensors[f"{LAYER}.self_attn.k_proj.input_scale"].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "expected a positive number as the scale of inputs, got 0.0"),
        (-1.0, "expected a positive number as the scale of inputs, got -1.0"),
        (float("nan"), "expected a positive number as the scale of inputs, got nan"),
        (0.25, "has other scales of inputs than the rest of qkv_proj"),
    ],
)
def test_verify_finds_wrong_scales(value: float, message: str, converted: tuple[Path, Path], tmp_path: Path):
    """By themselves where there is no report, by the checksums where there is one."""
    folder = shutil.copytree(converted[1], tmp_path / "out")
    change_scale(folder, value)
    found = quantconvert.verify(folder)
    assert any(finding.check == "checksums" for finding in found.findings)
    assert any(message in finding.message for finding in found.findings)
    (folder / "quantconvert.json").unlink()
    assert any(message in finding.message for finding in quantconvert.verify(folder).findings)


def test_the_result_as_a_source(converted: tuple[Path, Path], tmp_path: Path):
    """Dequantized, and repacked with its scales as they are; inspect counts them."""
    _, out = converted
    quantconvert.repack(out, tmp_path / "again", "compressed-tensors")
    assert quantconvert.verify(tmp_path / "again").is_ok
    again, before = read_tensors(tmp_path / "again"), read_tensors(out)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    same = [json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "again")]
    assert same[0] == same[1]
    quantconvert.dequantize(out, tmp_path / "plain")
    assert not any("scale" in name for name in read_tensors(tmp_path / "plain"))
    quantconvert.repack(out, tmp_path / "rtn", "rtn")
    assert not any(name.endswith("input_scale") for name in read_tensors(tmp_path / "rtn"))
    assert quantconvert.inspect(out).num_quantized_modules == 14


def test_ranks_have_the_scale_too(converted: tuple[Path, Path], tmp_path: Path):
    source, out = converted
    path = llama_statistics(tmp_path / "s.safetensors")
    scales = scales_of(out)
    found = dict(quantconvert.iter_quantized(source, tp_rank=0, tp_size=1, statistics=str(path), **STATIC))
    assert all(torch.equal(found[f"{module}.input_scale"], scale) for module, scale in scales.items())


def test_another_file_is_another_conversion(tmp_path: Path):
    """An interrupted run goes on with the same file only, wherever that lies."""
    source = write_checkpoint(tmp_path / "in")
    path = llama_statistics(tmp_path / "s.safetensors")
    options: dict[str, Any] = {"statistics": str(path), **STATIC}
    interrupt(source, tmp_path / "out", **options)
    kept = path.read_bytes()
    status = path.stat()
    llama_statistics(path, change={f"{LAYER}.mlp.down_proj.max": torch.tensor([99.0])})
    limits: dict[str, Any] = {"workers": 1, "max_shard_size": "60KB"}
    with pytest.raises(quantconvert.OutputError, match="mtime of the statistics"):
        quantconvert.convert(source, tmp_path / "out", **options, **limits)
    path.write_bytes(kept)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    quantconvert.convert(source, tmp_path / "out", **options, **limits)
    quantconvert.convert(source, tmp_path / "straight", **options, **limits)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_statistics_of_other_weights_are_refused(tmp_path: Path):
    """The same shapes and names: a fine-tune of what was observed, say."""
    source = write_checkpoint(tmp_path / "in")
    other = write_checkpoint(tmp_path / "other", {n: t * 1.01 for n, t in llama_tensors().items()})
    observed = fingerprint(load_checkpoint(LocalFolder(source)).tensors, reader_of(LocalFolder(source)))
    path = llama_statistics(tmp_path / "s.safetensors", fingerprint=observed)
    assert quantconvert.plan(source, statistics=str(path), **STATIC).statistics
    with pytest.raises(CheckpointError, match="are of other weights, of the same shapes") as caught:
        quantconvert.plan(other, statistics=str(path), **STATIC)
    assert "observe this checkpoint" in str(caught.value.hint)


def test_statistics_that_nothing_reads_and_those_of_few_tokens_are_told(tmp_path: Path):
    source, path = write_checkpoint(tmp_path / "in"), llama_statistics(tmp_path / "s.safetensors")
    notes = quantconvert.plan(source, statistics=str(path), bits=8).notes
    assert any("nothing here reads them" in note for note in notes)
    notes = quantconvert.plan(source, statistics=str(path), **STATIC).notes
    assert any("of 256 tokens alone" in note for note in notes)


def test_another_file_is_no_file_of_statistics(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(CheckpointError, match="is no file of statistics"):
        quantconvert.plan(source, statistics=str(source / "config.json"), **STATIC)
