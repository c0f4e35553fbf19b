"""--rotate: what becomes of each tensor, what is refused, and that verification, resume and workers hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.buffers import Workspace
from quantconvert.checkpoint import LocalFolder
from quantconvert.checkpoint.ranges import Files
from quantconvert.planning import Plan
from quantconvert.sources import cost_of, open_rows, scratch_nbytes
from quantconvert.sources.slabs import slabs_of
from quantconvert.sources.steps import Step
from quantconvert.sources.steps.turn import Fill, TurnColumns, TurnRows
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, write_checkpoint
from tests.interrupted import interrupt
from tests.snapshots import digests

OPTIONS: dict[str, Any] = {"scheme": "W8A8", "rotate": "r1,r2"}
LAYER = "model.layers.0."


def tied() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A Llama that has its head from the embeddings, with a bias at each projection."""
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name.replace("weight", "bias")] = tensors[name][:, 0].clone()
    return tensors, LLAMA_CONFIG | {"tie_word_embeddings": True}


def source_of(folder: Path, **config: Any) -> Path:
    tensors, known = tied()
    return write_checkpoint(folder, tensors, known | config)


def steps_of(plan: Plan) -> dict[str, tuple[Step, ...]]:
    return {task.source.name: task.source.steps for task in plan.tasks if task.source.steps}


def test_each_tensor_takes_its_steps(tmp_path: Path):
    plan = quantconvert.plan(source_of(tmp_path), **OPTIONS)
    refs = {ref.name: ref for ref in plan.checkpoint.tensors}
    steps = steps_of(plan)
    names = (f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight", "model.norm.weight")
    first, second, last = (refs[name] for name in names)
    expected: dict[str, tuple[Step, ...]] = {
        "model.embed_tokens.weight": (TurnColumns(128),),
        "lm_head.weight": (TurnColumns(128, last),),
        "model.norm.weight": (Fill(1.0),),
        first.name: (Fill(1.0),),
        second.name: (Fill(1.0),),
        f"{LAYER}self_attn.q_proj.weight": (TurnColumns(128, first),),
        f"{LAYER}self_attn.k_proj.weight": (TurnColumns(128, first),),
        f"{LAYER}self_attn.v_proj.weight": (TurnColumns(128, first), TurnRows(64)),
        f"{LAYER}self_attn.v_proj.bias": (TurnColumns(64),),
        f"{LAYER}self_attn.o_proj.weight": (TurnRows(128), TurnColumns(64)),
        f"{LAYER}self_attn.o_proj.bias": (TurnColumns(128),),
        f"{LAYER}mlp.gate_proj.weight": (TurnColumns(128, second),),
        f"{LAYER}mlp.up_proj.weight": (TurnColumns(128, second),),
        f"{LAYER}mlp.down_proj.weight": (TurnRows(128),),
        f"{LAYER}mlp.down_proj.bias": (TurnColumns(128),),
    }
    assert {name: found for name, found in steps.items() if "layers.1" not in name} == expected
    assert len(steps) == 3 + 2 * (len(expected) - 3)


def test_a_tied_head_becomes_a_tensor(tmp_path: Path):
    source, out = source_of(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out, **OPTIONS)
    config, tensors = json.loads((out / "config.json").read_text()), read_tensors(out)
    assert config["tie_word_embeddings"] is False
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert "lm_head" in config["quantization_config"]["ignore"]
    plan = quantconvert.plan(source, **OPTIONS)
    nbytes = tensors["lm_head.weight"].numel() * 2
    assert any(f"{nbytes} bytes more" in note for note in plan.notes)
    assert any("changes 13 tensors that are kept" in note for note in plan.notes)
    assert sum(plan.accounts.values()) == len(plan.checkpoint.tensors)


def test_nothing_is_rotated_unless_asked_for(tmp_path: Path):
    source = source_of(tmp_path)
    plain = quantconvert.plan(source, scheme="W8A8")
    assert not steps_of(plain)
    assert plain.config["tie_word_embeddings"] is True
    assert plain.digest != quantconvert.plan(source, **OPTIONS).digest


def test_int4_by_groups_is_told_what_it_costs_and_nothing_else_moves_columns(tmp_path: Path):
    """And is not equalized on top."""
    plan = quantconvert.plan(source_of(tmp_path), group_size=32, rotate="r1")
    assert any("costs accuracy at int4 by groups" in note for note in plan.notes)
    assert plan.factors is None
    assert not any("int4" in note for note in quantconvert.plan(source_of(tmp_path / "b"), **OPTIONS).notes)
    with pytest.raises(quantconvert.UsageError, match="--rotate r1 contradicts --equalize"):
        quantconvert.plan(tmp_path, rotate="r1", equalize=True)
    with pytest.raises(quantconvert.UsageError, match="--smooth contradicts --rotate"):
        quantconvert.plan(tmp_path, rotate="r1", smooth=0.5)
    with pytest.raises(quantconvert.UsageError, match="--statistics contradicts --rotate r1"):
        quantconvert.plan(tmp_path, scheme="W8A8", rotate="r1", statistics="stats.safetensors")


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16:g32"])
def test_the_bytes_are_the_same_for_any_workers_and_memory(scheme: str, tmp_path: Path):
    source = source_of(tmp_path / "in")
    outs = [tmp_path / str(i) for i in range(3)]
    limits: tuple[dict[str, Any], ...] = ({}, {"workers": 1, "memory_limit": "12MB"}, {"workers": 3})
    for out, limit in zip(outs, limits, strict=True):
        quantconvert.convert(source, out, **OPTIONS | {"scheme": scheme} | limit)
    assert digests(outs[0]) == digests(outs[1]) == digests(outs[2])


@pytest.mark.parametrize("name", ["self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_rows_in_a_scratch_file_are_the_rows_in_memory(name: str, tmp_path: Path):
    """Whatever the room, each part of rows and columns is the same; and what it takes was planned."""
    source = source_of(tmp_path)
    plan = quantconvert.plan(source, **OPTIONS)
    read = next(task.source for task in plan.tasks if task.source.name == f"{LAYER}{name}.weight")
    rows, columns = read.matrix
    whole = 4 * rows * columns
    files = Files(LocalFolder(source))
    held = open_rows(read, files, Workspace(), 1 << 30).rows(0, rows).clone()
    for room in (1, 12 * rows * 10, whole - 1):
        slabs = slabs_of(read.matrix, room)
        assert not slabs.is_held
        assert scratch_nbytes(read, room) == whole
        assert cost_of(read, room).held < cost_of(read, 1 << 30).held + 12 * rows * slabs.columns
        filed = open_rows(read, files, Workspace(tmp_path), room)
        assert torch.equal(filed.rows(0, rows), held)
        assert torch.equal(filed.rows(3, 40), held[3:40])
        assert torch.equal(filed.rows(3, 40, (7, 51)), held[3:40, 7:51])
    assert slabs_of(read.matrix, whole).is_held
    assert scratch_nbytes(read, whole) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    files.close()


def test_columns_are_parts_of_whole_rows(tmp_path: Path):
    """A rank that reads some columns of a rotated weight gets those of the whole one."""
    source = source_of(tmp_path)
    plan = quantconvert.plan(source, **OPTIONS)
    read = next(task.source for task in plan.tasks if task.source.name == f"{LAYER}mlp.up_proj.weight")
    files = Files(LocalFolder(source))
    whole = open_rows(read, files, Workspace(), 1 << 20).rows(0, 256).clone()
    assert torch.equal(open_rows(read, files, Workspace(), 1 << 20).rows(5, 9, (32, 96)), whole[5:9, 32:96])
    files.close()


def test_ranks_hold_what_a_conversion_writes(tmp_path: Path):
    source, out = source_of(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out, **OPTIONS)
    written = read_tensors(out)
    for name, tensor in quantconvert.iter_quantized(source, **OPTIONS):
        assert torch.equal(tensor, written[name]), name


def flip(folder: Path, name: str) -> None:
    """Change the lowest bit of the first byte of a tensor."""
    ref = next(ref for ref in quantconvert.plan(folder, requantize=True, bits=8).checkpoint.tensors if ref.name == name)
    with open(folder / ref.file, "r+b") as file:
        file.seek(ref.offset)
        byte = file.read(1)[0]
        file.seek(ref.offset)
        file.write(bytes([byte ^ 1]))


def test_verify_replays_the_rotation_and_finds_a_flipped_bit(tmp_path: Path):
    source, out = source_of(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out, verify=True, **OPTIONS)
    found = quantconvert.verify(out, source)
    assert found.is_ok, found.findings
    assert len(found.errors) == 14
    assert found.num_equal == 21
    names = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", f"{LAYER}self_attn.o_proj.bias")
    for name in names:
        flip(out, name)
        findings = quantconvert.verify(out, source).findings
        assert [finding.where for finding in findings if finding.check == "values"] == [name]
        flip(out, name)
    assert quantconvert.verify(out, source).is_ok


def test_another_rotation_is_not_this_one(tmp_path: Path):
    """What r1 wrote is not what r1,r2 would have."""
    source, out = source_of(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out, **OPTIONS | {"rotate": "r1"})
    assert quantconvert.verify(out, source).is_ok
    report = json.loads((out / "quantconvert.json").read_text())
    assert report["job"]["rotate"] == "r1"
    (out / "quantconvert.json").unlink()
    assert not quantconvert.verify(out, source).is_ok


def test_an_interrupted_run_ends_with_the_same_files(tmp_path: Path):
    source, whole, out = write_checkpoint(tmp_path / "in"), tmp_path / "whole", tmp_path / "out"
    options = {"workers": 1, "max_shard_size": "60KB", **OPTIONS}
    quantconvert.convert(source, whole, **options)
    interrupt(source, out, **OPTIONS)
    with pytest.raises(quantconvert.OutputError, match="rotate"):
        quantconvert.convert(source, out, **options | {"rotate": "r1"})
    quantconvert.convert(source, out, **options)
    assert digests(out) == digests(whole)


def changed(**more: Tensor | None) -> dict[str, Tensor]:
    """The tied Llama with tensors replaced, added or removed, `__` for a dot."""
    tensors = tied()[0]
    for name, tensor in more.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = tensor
    return tensors


W, V = torch.zeros(64, 128, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.bfloat16)
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no table": ({}, {"model_type": "gemma2"}, "no table says what reads and writes the residual stream of `gemma2`"),
    "unknown": ({}, {"model_type": "never_heard_of"}, "residual stream of `never_heard_of`"),
    "post norm": (
        changed(**{"model__layers__0__post_feedforward_layernorm__weight": V}), {}, "post_feedforward_layernorm.weight"
    ),
    "norm with a bias": (
        changed(**{"model__layers__0__input_layernorm__bias": V}), {}, "norms with a bias do more than divide"
    ),
    "tower": (changed(visual__merger__weight=W), {}, "whether the stream goes through `visual.merger.weight`"),
    "more layers": ({}, {"num_hidden_layers": 1}, "whether the stream goes through `model.layers.1."),
    "no head": ({}, {"architectures": ["LlamaModel"]}, "got architecture `LlamaModel` without"),
    "untied and no head": ({}, {"tie_word_embeddings": False}, "expected a head that reads the stream last"),
    "another head": (changed(score__weight=W), {}, "whether the stream goes through `score.weight`"),
    "no final norm": (changed(model__norm__weight=None), {}, "expected `model.norm.weight`"),
    "no norm": (changed(model__layers__0__input_layernorm__weight=None), {}, "may be read by `self_attn."),
    "two tables": (changed(other__embed_tokens__weight=W), {}, "expected one `embed_tokens.weight`, got 2"),
    "heads": ({}, {"num_attention_heads": 3}, "does not explain the heads of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_exactly_is_refused(name: str, tmp_path: Path):
    tensors, config, text = REFUSED[name]
    source = write_checkpoint(tmp_path, tensors or tied()[0], tied()[1] | config)
    with pytest.raises(quantconvert.QuantConvertError) as caught:
        quantconvert.plan(source, allow_incomplete=True, **OPTIONS)
    said = str(caught.value)
    assert text in said
    assert said.count("no table says") <= 1
    if name == "heads":
        quantconvert.plan(source, **OPTIONS | {"rotate": "r1"})


def test_an_odd_width_is_refused(tmp_path: Path):
    tensors = llama_tensors(hidden=105, kv=105)
    config = LLAMA_CONFIG | {"num_attention_heads": 1, "hidden_size": 105, "intermediate_size": 256}
    source = write_checkpoint(tmp_path, tensors, config)
    with pytest.raises(quantconvert.QuantConvertError, match="r1: 105 channels are an odd number"):
        quantconvert.plan(source, **OPTIONS)


def test_kept_weights_are_rotated_too(tmp_path: Path):
    """A layer that a rule leaves in high precision reads and writes the stream like any other."""
    source, out = source_of(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out, verify=True, ignore=["*.down_proj"], **OPTIONS)
    before, after = read_tensors(source), read_tensors(out)
    down = f"{LAYER}mlp.down_proj.weight"
    assert after[down].dtype == torch.bfloat16
    torch.testing.assert_close(after[down].float().norm(dim=0), before[down].float().norm(dim=0), rtol=5e-3, atol=0)
    assert not torch.equal(after[down], before[down])


def test_a_quantized_source_is_rotated_after_decoding(tmp_path: Path):
    """Codes in, codes out: each through the decoder of its own encoding."""
    source, middle, out = source_of(tmp_path / "in"), tmp_path / "middle", tmp_path / "out"
    quantconvert.convert(source, middle, scheme="W8A16", format="compressed-tensors")
    quantconvert.convert(middle, out, verify=True, requantize=True, **OPTIONS)
    assert quantconvert.verify(out, middle).is_ok


def test_reads_keep_what_they_are(tmp_path: Path):
    """Steps are all that differs between the reads of the two plans, but for the tied head."""
    source = source_of(tmp_path)
    plain = {task.source.name: task.source for task in quantconvert.plan(source, scheme="W8A8").tasks}
    turned = {task.source.name: task.source for task in quantconvert.plan(source, **OPTIONS).tasks}
    assert turned.keys() == plain.keys() | {"lm_head.weight"}
    for name, read in plain.items():
        parts = 2 if "embed_tokens" in name else 1
        assert replace(turned[name], steps=()) == replace(read, parts=parts)


def test_what_is_not_finite_is_told_as_it_is_stored(tmp_path: Path):
    """A rotation would spread it over the row, or over all rows."""
    name = f"{LAYER}mlp.down_proj.weight"
    weight = tied()[0][name].clone()
    weight[3, 5] = torch.inf
    source = write_checkpoint(tmp_path / "in", changed(**{name.replace(".", "__"): weight}), tied()[1])
    with pytest.raises(quantconvert.CheckpointError, match=r"down_proj.*holds 1 Inf, first at \[3, 5\]"):
        quantconvert.convert(source, tmp_path / "out", **OPTIONS)
