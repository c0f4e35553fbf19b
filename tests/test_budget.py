"""`--target-bits`: what is raised, that the plan's own count agrees, and that what is printed says it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.checkpoint import LocalFolder, load_checkpoint, reader_of
from quantconvert.events import silent
from quantconvert.job import Job
from quantconvert.planning import build_plan
from quantconvert.planning.budget import Offer, find_offer, spend
from quantconvert.recipe import read_recipe, write_recipe
from quantconvert.run.measure import measure
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint

LAYERS = 3
ATTENTION = ("q_proj", "k_proj", "v_proj")
CONFIG = LLAMA_CONFIG | {"num_hidden_layers": LAYERS}


def loud(tensors: dict[str, torch.Tensor], module: str) -> None:
    """One column of a weight far above the others: its groups lose most to four bits."""
    tensors[f"{module}.weight"][:, 3] *= 30


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers alike, but for two loud weights."""
    tensors = llama_tensors(layers=LAYERS)
    loud(tensors, "model.layers.1.mlp.down_proj")
    loud(tensors, "model.layers.2.self_attn.q_proj")
    return write_checkpoint(tmp_path_factory.mktemp("budget") / "model", tensors, CONFIG, shards=2)


def offer_of(source: Path) -> Offer:
    """What may be raised of a checkpoint by the defaults."""
    repo, job = LocalFolder(source), Job.from_options({})
    checkpoint = load_checkpoint(repo)

    def plan_of(job: Job) -> quantconvert.Plan:
        return build_plan(checkpoint, job, reader_of(repo))

    return find_offer(job, plan_of(job), plan_of)


def raised(plan: quantconvert.Plan) -> set[str]:
    return {t.source.module for t in plan.quantized if t.scheme and t.scheme.num_bits == 8}


def layers(module: str, *members: str) -> set[str]:
    return {f"{module}.{member}" for member in members}


def test_whole_sets_are_raised_and_the_plan_counts_the_bits(source: Path):
    plan = quantconvert.plan(source, target_bits=5)
    assert plan.budget
    assert plan.budget.spent.bits == pytest.approx(plan.bits_per_quantized_weight, abs=1e-12)
    assert 4.5 < plan.bits_per_quantized_weight <= 5
    found = raised(plan)
    assert found >= layers("model.layers.2.self_attn", *ATTENTION)
    for layer in range(LAYERS):
        for members in (ATTENTION, ("gate_proj", "up_proj")):
            hits = {m for m in found if f".layers.{layer}." in m and m.endswith(members)}
            assert len(hits) in (0, len(members))
    assert plan.budget.num_raised == len({re.sub(r"(q|k|v)_proj", "a", m).replace("up_", "gate_") for m in found})


def test_the_loudest_come_first_and_more_bits_raise_more(source: Path):
    """q/k/v of layer 2 is loud and has values; of the other kinds layer 1's down is loud."""
    least = quantconvert.plan(source, target_bits=4.6)
    assert {m for m in raised(least) if not m.endswith("o_proj")} == layers("model.layers.2.self_attn", *ATTENTION)
    noises, before = [], set[str]()
    for target in (4.6, 5.2, 5.8, 6.6):
        plan = quantconvert.plan(source, target_bits=target)
        assert plan.budget
        assert plan.bits_per_quantized_weight <= target
        noises.append(plan.budget.spent.noise)
        if target >= 5.8:
            assert "model.layers.1.mlp.down_proj" in raised(plan)
        before = raised(plan)
    assert noises == sorted(noises, reverse=True)
    assert len(before) > 9


def test_the_curve_goes_from_nothing_to_all(source: Path):
    plan = quantconvert.plan(source, target_bits=5)
    assert plan.budget
    curve = plan.budget.curve
    assert len(curve) == 4 * LAYERS + 1 == plan.budget.num_sets + 1
    assert curve[0].noise == 1
    assert curve[-1].noise < 0.02
    assert [p.bits for p in curve] == sorted(p.bits for p in curve)
    assert [p.noise for p in curve] == sorted((p.noise for p in curve), reverse=True)
    every = quantconvert.plan(source, scheme="W8A16:channel", format="compressed-tensors")
    assert curve[-1].bits == pytest.approx(every.bits_per_quantized_weight)
    none = quantconvert.plan(source, format="compressed-tensors")
    assert curve[0].bits == pytest.approx(none.bits_per_quantized_weight)


def test_noise_is_that_of_the_conversion(source: Path, tmp_path: Path):
    """Where all rows are in the sample: a set's noise is the report's relative error of an unequalized conversion."""
    offer = offer_of(source)
    plan = quantconvert.convert(source, tmp_path / "out", equalize=False, format="compressed-tensors").plan
    found = measure(offer, LocalFolder(source), plan.execution, silent)
    tensors = json.loads((tmp_path / "out" / "quantconvert.json").read_text())["tensors"]
    assert found.keys() == tensors.keys()
    for name, (signal, base, eight) in found.items():
        assert (base / signal) ** 0.5 == pytest.approx(tensors[name]["relative_error"], rel=1e-3), name
        assert eight < base / 50


def test_the_outcome_is_rules_that_say_the_same_by_themselves(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "a", target_bits=5, base_model="a/b")
    plan = quantconvert.plan(source, target_bits=5)
    (tmp_path / "recipe.toml").write_text(write_recipe(plan.job, plan.format))
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert "target_bits" not in recipe
    assert [str(rule) for rule in recipe["rules"]] == [str(rule) for rule in plan.job.rules]
    quantconvert.convert(source, tmp_path / "b", base_model="a/b", **recipe)
    for path in sorted((tmp_path / "a").iterdir()):
        if path.suffix in (".safetensors", ".factors") or path.name == "config.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    report = json.loads((tmp_path / "a" / "quantconvert.json").read_text())
    assert report["budget"]["target_bits"] == 5
    assert report["budget"]["rules"] == [str(rule) for rule in plan.job.rules]
    assert "budget" not in json.loads((tmp_path / "b" / "quantconvert.json").read_text())
    assert quantconvert.verify(tmp_path / "a", source).is_ok


def test_what_rules_have_decided_stays(source: Path):
    options: dict[str, Any] = {"rules": ["*.o_proj=W8A16:g128"], "ignore": ["model.layers.2.self_attn.*"]}
    plan = quantconvert.plan(source, target_bits=5.4, **options)
    schemes = {task.source.module: task.scheme for task in plan.tasks}
    assert plan.budget
    assert plan.budget.num_sets == 4 * LAYERS - LAYERS - 1  # no o_proj, no q/k/v of layer 2
    given = schemes["model.layers.0.self_attn.o_proj"]
    assert given == schemes["model.layers.1.self_attn.o_proj"]
    assert given
    assert given.label == "int8 g128 symmetric"
    assert schemes["model.layers.2.self_attn.q_proj"] is None
    assert plan.bits_per_quantized_weight == pytest.approx(plan.budget.spent.bits)


def test_the_experts_of_a_layer_are_one_set(tmp_path: Path):
    tensors = llama_tensors(layers=2)
    for layer in range(2):
        for name in ("gate", "up", "down"):
            del tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"]
        for e in range(3):
            stem = f"model.layers.{layer}.mlp.experts.{e}"
            tensors |= {
                f"{stem}.gate_proj.weight": weight(128, 128, seed=90 + e),
                f"{stem}.up_proj.weight": weight(128, 128, seed=92 + e),
                f"{stem}.down_proj.weight": weight(128, 128, seed=94 + e),
            }
    loud(tensors, "model.layers.1.mlp.experts.2.up_proj")
    config = LLAMA_CONFIG | {"model_type": "qwen3_moe", "num_experts": 3}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    plan = quantconvert.plan(source, target_bits=6.9)
    assert plan.budget
    assert plan.budget.num_sets == 6
    experts = {m for m in raised(plan) if ".experts." in m}
    assert len(experts) == 9
    assert all(".layers.1." in m for m in experts)


def test_the_zero_points_that_a_mix_costs_are_said(source: Path):
    def said(**options: Any) -> bool:
        notes = quantconvert.plan(source, target_bits=5, **options).notes
        return any("has zero points, which may be worth more than the bits" in note for note in notes)

    assert said()
    assert not said(symmetric=True)
    assert not said(symmetric=False)
    assert not said(format="compressed-tensors")


def test_w4a8_is_raised_to_w8a8(source: Path):
    plan = quantconvert.plan(source, scheme="W4A8", target_bits=5)
    assert {s.label for s in plan.schemes} == {
        "int4 g128 symmetric, int8 activations", "int8 per channel symmetric, int8 activations",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_bits": 4.0}, r"--target-bits 4: expected at least 4\.\d+: int4 g128 symmetric takes 4\.1\d+ in"),
        ({"target_bits": 9}, r"--target-bits 9: expected at most 8\.\d+, what every layer at 8 bits takes"),
        ({"target_bits": 5, "bits": 8}, r"raises layers from 4 bits to 8: expected --bits 4, got 8"),
        ({"target_bits": 5, "format": "awq"}, r"awq holds (one scheme|4 bits)"),
        ({"target_bits": 5, "rules": ["*=W8A16"]}, "finds no layer to raise"),
        ({"target_bits": -1}, "--target-bits: expected a number above 0, got -1"),
        ({"target_bits": float("nan")}, "--target-bits: expected a number above 0, got nan"),
        ({"target_bits": True}, "--target-bits: expected a number above 0, got True"),
    ],
)
def test_refusals(source: Path, options: dict[str, Any], said: str):
    with pytest.raises(quantconvert.QuantConvertError, match=said):
        quantconvert.plan(source, **options)


def test_nan_is_named(tmp_path: Path):
    tensors = llama_tensors(layers=1)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    with pytest.raises(quantconvert.CheckpointError, match=r"up_proj\.weight` in .* holds 1 NaN, first at \[3, 5\]"):
        quantconvert.plan(source, target_bits=5)
    plan = quantconvert.plan(source, target_bits=6, nan_policy="keep")
    assert plan.budget
    assert plan.budget.num_sets == 3  # gate goes with up


def test_zero_weights_gain_nothing(tmp_path: Path):
    """A set without signal is raised last, and divides by nothing."""
    tensors = llama_tensors(layers=2)
    for name in ATTENTION:
        tensors[f"model.layers.0.self_attn.{name}.weight"].zero_()
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG)
    plan = quantconvert.plan(source, target_bits=7)
    assert not any(m.startswith("model.layers.0.self_attn.q") for m in raised(plan))
    assert len(raised(plan)) > 5


def test_spend_needs_no_checkpoint(source: Path):
    """Pure arithmetic: gains, and what no longer fits is passed over."""
    offer = offer_of(source)
    flat = {task.source.name: (1.0, 0.01, 0.0) for found in offer.sets for task in found.tasks}
    output = next(found for found in offer.sets if found.modules == ("model.layers.0.self_attn.o_proj",))
    room = offer.least + 8 * 1.02 * (output.raised_nbytes - output.nbytes) / offer.num_weights
    tight = spend(offer, flat, room)  # q/k/v gain three times as much a bit, and do not fit: o does
    assert [rule.pattern for rule in tight.rules] == [r"re:.*layers\.(0)\.self_attn\.o_proj$"]
    wide = spend(offer, flat, offer.most)
    assert wide.num_raised == wide.num_sets == len(offer.sets)
    assert wide.spent.noise == pytest.approx(0)


def test_the_same_for_any_number_of_workers(source: Path, tmp_path: Path):
    for workers in (1, 3):
        quantconvert.convert(source, tmp_path / str(workers), target_bits=5, workers=workers)
    one, three = (read_tensors(tmp_path / name) for name in ("1", "3"))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
