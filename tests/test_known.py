"""What is known of inputs on its way to methods and factors: from statistics, or from a bag of tokens."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.checkpoint import LocalFolder
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, QuantConvertError, Refusal
from quantconvert.events import Event, Progress, Started
from quantconvert.factors import FACTORS, IMPORTANCES, beside, read_places
from quantconvert.factors.recipe import combined, equalize, smooth
from quantconvert.factors.room import bag_nbytes
from quantconvert.planning import Quantize
from quantconvert.run.knowing import input_max_of, inputs_of
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.snapshots import digests
from tests.statistics import llama_statistics

LAYER = "model.layers.0"
SEARCH: dict[str, Any] = {"method": "search", "group_size": 32, "symmetric": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors()
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = (1 + 5 * tensor.float()).bfloat16()
    return write_checkpoint(tmp_path_factory.mktemp("known") / "in", tensors)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With moments of the inputs that have them, which all but the last do."""
    folder = tmp_path_factory.mktemp("statistics")
    moments: dict[str, Tensor | None] = {}
    for i in range(2):
        widths = {"self_attn.q_proj": 128, "self_attn.o_proj": 128, "mlp.gate_proj": 128, "mlp.down_proj": 256}
        for j, (name, width) in enumerate(widths.items()):
            x = weight(512, width, seed=10 * i + j, dtype=torch.float32) @ weight(width, width, dtype=torch.float32)
            moments[f"model.layers.{i}.{name}.moments"] = x.T @ x / 512
    return llama_statistics(folder / "stats.safetensors", change=moments)


def task_of(plan: quantconvert.Plan, module: str) -> Quantize:
    task = next(task for task in plan.tasks if task.source.module == module)
    assert isinstance(task, Quantize)
    return task


def vector(folder: Path, name: str, file: str = FACTORS) -> Tensor:
    ref = read_places(folder, file, -1.0)[name]
    content = (folder / file).read_bytes()[ref.offset : ref.offset + ref.nbytes]
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


def test_a_bag_serves_search_and_factors(source: Path, tmp_path: Path):
    """The first pass finds importances; factors and codes use them; nothing but factors is left beside the result."""
    out = tmp_path / "out"
    quantconvert.convert(source, out, equalize=True, verify=True, workers=1, **SEARCH)
    quantconvert.convert(source, tmp_path / "again", equalize=True, workers=3, memory_limit="80MB", **SEARCH)
    assert digests(out) == digests(tmp_path / "again")
    assert not (out / IMPORTANCES).exists()
    assert not any(path.name.startswith(".") for path in out.iterdir())
    plain = tmp_path / "plain"
    quantconvert.convert(source, plain, equalize=True, group_size=32, symmetric=False)
    assert not torch.equal(vector(out, f"{LAYER}.mlp.up_proj"), vector(plain, f"{LAYER}.mlp.up_proj"))
    assert json.loads((out / "quantconvert.json").read_text())["job"]["method"] == "search"


def test_an_interrupted_run_keeps_its_importances(source: Path, tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SEARCH, "equalize": True, "workers": 1, "max_shard_size": "60KB"}
    quantconvert.convert(source, whole, **options)
    names: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            names.extend([event.name] if (out / ".quantconvert" / FACTORS).exists() else [])
            if len(set(names)) > 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantconvert.convert(source, out, report=report, **options)
    assert (out / ".quantconvert" / IMPORTANCES).exists()
    when = (out / ".quantconvert" / IMPORTANCES).stat().st_mtime_ns
    seen: set[int] = set()

    def watch(event: Event) -> None:
        path = out / ".quantconvert" / IMPORTANCES
        seen.add(path.stat().st_mtime_ns if path.exists() else 0)

    quantconvert.convert(source, out, report=watch, **options)
    assert seen <= {when, 0}
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("heads", [False, True], ids=["norm", "heads"])
def test_importances_follow_the_factors(source: Path, statistics: Path, tmp_path: Path, heads: bool):
    """x_j is multiplied by mu_j, so E[x_j^2] by its square, and moments by both."""
    options: dict[str, Any] = {"method": "gptq", "group_size": 32, "statistics": str(statistics), "equalize": True}
    out = tmp_path / "out"
    quantconvert.convert(source, out, verify=True, **options)
    module = f"{LAYER}.self_attn.o_proj" if heads else f"{LAYER}.mlp.gate_proj"
    giver = f"{LAYER}.self_attn.v_proj" if heads else f"{LAYER}.post_attention_layernorm"
    mu = vector(out, giver)
    mu = torch.cat([mu[:64], mu[:64]]) if heads else mu  # two query heads read one key-value head
    files = Files(LocalFolder(source), beside(out, statistics))
    found = inputs_of(task_of(quantconvert.plan(source, **options), module), files)
    files.close()
    stored = read_tensors(statistics.parent)
    assert found is not None
    assert found.importance is not None
    assert found.moments is not None
    assert torch.allclose(found.importance, stored[f"{module}.second_moment"] * mu * mu)
    assert torch.allclose(found.moments, stored[f"{module}.moments"] * mu * mu[:, None])


def test_factors_from_statistics_are_the_recipe(source: Path, statistics: Path, tmp_path: Path):
    out = tmp_path / "out"
    options: dict[str, Any] = {"group_size": 32, "equalize": True, "statistics": str(statistics)}
    quantconvert.convert(source, out, **options)
    tensors, h = read_tensors(source), read_tensors(statistics.parent)[f"{LAYER}.mlp.down_proj.second_moment"]
    down = tensors[f"{LAYER}.mlp.down_proj.weight"].float()
    expected = combined(equalize(lambda: [(down.clone(), 32)], 256), h)
    expected = (expected / expected.max()).clamp(min=1 / 256)
    assert torch.allclose(vector(out, f"{LAYER}.mlp.up_proj"), expected, rtol=1e-5)


def test_smoothquant_by_statistics_and_by_a_bag(source: Path, statistics: Path, tmp_path: Path):
    out = tmp_path / "out"
    options: dict[str, Any] = {"scheme": "W8A8", "smooth": 0.5}
    quantconvert.convert(source, out, statistics=str(statistics), verify=True, **options)
    down = read_tensors(source)[f"{LAYER}.mlp.down_proj.weight"].float()
    maxima = read_tensors(statistics.parent)[f"{LAYER}.mlp.down_proj.channel_max"]
    expected = smooth(maxima, down.abs().amax(0), 0.5)
    expected = (expected / expected.max()).clamp(min=1 / 256)
    assert torch.allclose(vector(out, f"{LAYER}.mlp.up_proj"), expected, rtol=1e-5)
    quantconvert.convert(source, tmp_path / "bag", verify=True, **options)
    assert not torch.allclose(vector(tmp_path / "bag", f"{LAYER}.mlp.up_proj"), expected, rtol=1e-2)


def test_a_stored_input_scale_follows_the_factors(source: Path, statistics: Path, tmp_path: Path):
    out = tmp_path / "out"
    options: dict[str, Any] = {"scheme": "W8A8_STATIC", "smooth": 0.5, "statistics": str(statistics)}
    quantconvert.convert(source, out, verify=True, **options)
    module = f"{LAYER}.mlp.down_proj"
    mu, maxima = vector(out, f"{LAYER}.mlp.up_proj"), read_tensors(statistics.parent)[f"{module}.channel_max"]
    scale = read_tensors(out)[f"{module}.input_scale"]
    assert scale == ((maxima * mu).max() / 127.5).bfloat16()
    files = Files(LocalFolder(source), beside(out, statistics))
    assert input_max_of(task_of(quantconvert.plan(source, **options), module), files) == float((maxima * mu).max())
    files.close()
    q, k = (read_tensors(out)[f"{LAYER}.self_attn.{name}_proj.input_scale"] for name in "qk")
    assert torch.equal(q, k)


def test_what_nothing_is_known_of_is_rounded_to_nearest(source: Path, tmp_path: Path):
    partial = llama_statistics(tmp_path / "partial.safetensors", layers=1)
    plan = quantconvert.plan(source, statistics=str(partial), **SEARCH)
    assert any("nothing is known of the inputs of 7 weights" in note for note in plan.notes)
    assert task_of(plan, "model.layers.1.mlp.up_proj").method == "rtn"
    assert task_of(plan, f"{LAYER}.mlp.up_proj").method == "search"
    quantconvert.convert(source, tmp_path / "out", statistics=str(partial), verify=True, **SEARCH)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq alone": ({"method": "gptq"}, "expected a source of the second moments"),
    "search and rotate": ({"method": "search", "rotate": "r1"}, "knows the inputs as they are, not as --rotate"),
    "smooth and equalize": ({"smooth": 0.5, "equalize": True}, "--smooth contradicts --equalize"),
    "smooth of two": ({"smooth": 2}, "from 0 to 1"),
    "little memory": ({"method": "search", "memory_limit": "9MB"}, "a bag of tokens needs"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_before_anything_is_read(options: dict[str, Any], message: str, source: Path):
    with pytest.raises((QuantConvertError, Refusal), match=message):
        quantconvert.plan(source, **options)


def test_a_family_without_a_block_has_no_bag(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", config=LLAMA_CONFIG | {"model_type": "nothing-known"})
    for options in ({"method": "search"}, {"scheme": "W8A8", "smooth": 0.5}):
        with pytest.raises((QuantConvertError, Refusal), match="no bag of tokens finds here") as caught:
            quantconvert.plan(source, **options)
        assert "quantconvert observe" in str(caught.value) + str(caught.value.__dict__)


def test_moments_that_the_file_lacks(source: Path, tmp_path: Path):
    path = llama_statistics(tmp_path / "s.safetensors")
    with pytest.raises(QuantConvertError, match="holds no moments") as caught:
        quantconvert.plan(source, method="gptq", statistics=str(path))
    assert "--moments" in str(caught.value.hint)


def test_smooth_leaves_alone_what_nothing_is_known_of(source: Path, tmp_path: Path):
    """Statistics of the first layer alone: the second is converted as it is, and a note says so."""
    few = llama_statistics(tmp_path / "few.safetensors", layers=1)
    options: dict[str, Any] = {"scheme": "W8A8", "smooth": 0.5, "statistics": str(few)}
    plan = quantconvert.plan(source, **options)
    assert plan.factors is not None
    assert all(wanted.site.name.startswith("model.layers.0.") for wanted in plan.factors.wanted)
    assert any("model.layers.1.input_layernorm` is a vector of which --statistics say nothing" in n for n in plan.notes)
    quantconvert.convert(source, tmp_path / "out", verify=True, **options)
    assert read_places(tmp_path / "out").keys() == {wanted.site.name for wanted in plan.factors.wanted}


@pytest.mark.parametrize("options", [{"smooth": 0.5, "scheme": "W8A8"}, {"equalize": True}], ids=["smooth", "equalize"])
def test_progress_of_the_first_pass_ends_where_it_was_said_to(source: Path, tmp_path: Path, options: dict[str, Any]):
    statistics = llama_statistics(tmp_path / "stats.safetensors")
    events: list[Event] = []
    quantconvert.convert(source, tmp_path / "out", report=events.append, statistics=str(statistics), **options)
    (begin,) = [i for i, event in enumerate(events) if isinstance(event, Started) and event.word == "equalizing"]
    started, rest = events[begin], events[begin + 1 :]
    end = next(i for i, event in enumerate(rest) if isinstance(event, Started))
    assert isinstance(started, Started)
    done = sum(event.nbytes for event in rest[:end] if isinstance(event, Progress))
    assert done == pytest.approx(started.source_nbytes, rel=0.02)


def test_statistics_that_change_meanwhile_are_refused(source: Path, tmp_path: Path):
    """Some weights would be smoothed by one file, and some judged by another."""
    path = llama_statistics(tmp_path / "stats.safetensors")

    def report(event: Event) -> None:
        if isinstance(event, Started) and event.word == "converting":
            path.write_bytes(path.read_bytes())

    with pytest.raises(CheckpointError, match="changed after they were opened"):
        quantconvert.convert(
            source, tmp_path / "out", report=report, scheme="W8A8_STATIC", equalize=False, statistics=str(path)
        )


def test_a_plan_tells_of_its_first_pass(source: Path, tmp_path: Path):
    few = llama_statistics(tmp_path / "few.safetensors", layers=1)
    plan = quantconvert.plan(source, equalize=True, statistics=str(few), **SEARCH)
    words = "4 vectors by what the weights and importances of inputs say, 4 vectors by what the weights say"
    assert str(plan.factors) == words
    plan = quantconvert.plan(source, equalize=True, **SEARCH)
    assert plan.knowledge is not None
    assert plan.knowledge.walk is not None
    assert plan.peak_nbytes == bag_nbytes(plan.knowledge.walk, plan.execution)
    assert plan.peak_nbytes > max(task.peak_nbytes for task in plan.tasks)


def test_a_plan_travels_to_other_processes(source: Path, tmp_path: Path):
    """With what it knows, and where that is nothing, too."""
    statistics = llama_statistics(tmp_path / "stats.safetensors")
    for options in ({}, SEARCH, {"statistics": str(statistics), "equalize": True}):
        plan = quantconvert.plan(source, **options)
        assert pickle.loads(pickle.dumps(plan)) == plan
