"""The plan: pure, complete, fast to import, and the rules of `--format auto`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantconvert
from quantconvert.patterns import compile_pattern, cover, nearest, template_of
from tests.builders import LLAMA_CONFIG, llama_tensors, weight, write_checkpoint

PACKAGE = Path(quantconvert.__file__).parent
FUSED = [("qkv_proj", ("q_proj", "k_proj", "v_proj"))]


@pytest.mark.process
def test_planning_imports_no_torch(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model")
    code = (
        "import sys, quantconvert, quantconvert.cli.main\n"
        f"plan = quantconvert.plan({str(source)!r})\n"
        f"quantconvert.inspect({str(source)!r})\n"
        "plan.to_json(), plan.digest\n"
        "assert not {'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("awq", "int4 g128 asymmetric")),
        ({"symmetric": True}, ("awq", "int4 g128 symmetric")),
        ({"group_size": 32}, ("awq", "int4 g32 asymmetric")),
        ({"group_size": 16}, ("compressed-tensors", "int4 g16 symmetric")),
        ({"group_size": -1}, ("compressed-tensors", "int4 per channel symmetric")),
        ({"bits": 8}, ("compressed-tensors", "int8 g128 symmetric")),
        ({"bits": 8, "group_size": -1}, ("compressed-tensors", "int8 per channel symmetric")),
        ({"scheme": "W4A16"}, ("awq", "int4 g128 symmetric")),
        ({"scheme": "W4A16_ASYM"}, ("awq", "int4 g128 asymmetric")),
        ({"scheme": "W8A16:channel"}, ("compressed-tensors", "int8 per channel symmetric")),
        ({"scheme": "W4A16:g64", "format": "compressed-tensors"}, ("compressed-tensors", "int4 g64 symmetric")),
    ],
    ids=str,
)
def test_format_auto(tmp_path: Path, options, expected: tuple[str, str]):
    plan = quantconvert.plan(write_checkpoint(tmp_path / "model"), **options)
    assert plan.scheme
    assert (plan.format, plan.scheme.label) == expected
    assert plan.format_reason


def test_format_auto_leaves_awq_for_narrow_outputs(tmp_path: Path):
    tensors = llama_tensors(layers=1) | {"model.layers.0.self_attn.k_proj.weight": weight(12, 128)}
    config = LLAMA_CONFIG | {"num_hidden_layers": 1}
    plan = quantconvert.plan(write_checkpoint(tmp_path / "model", tensors, config))
    assert plan.format == "compressed-tensors"
    assert plan.format_reason == (
        "awq packs 8 output features in a word: expected out_features % 8 == 0, got 12: "
        "`model.layers.0.self_attn.k_proj`"
    )


@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_neox", "falcon", "bloom", "mpt", "gptj"])
def test_format_auto_leaves_awq_where_transformers_scales_activations(tmp_path: Path, model_type: str):
    source = write_checkpoint(tmp_path / "model", config=LLAMA_CONFIG | {"model_type": model_type})
    plan = quantconvert.plan(source)
    assert plan.format == "compressed-tensors"
    asked = quantconvert.plan(source, format="awq")
    assert plan.format_reason in asked.notes
    assert plan.format_reason not in plan.notes
    assert "random numbers" in plan.format_reason


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "t5", "modernbert", "mamba", "nomic_bert"])
def test_format_auto_leaves_awq_where_transformers_cannot_load_it(tmp_path: Path, model_type: str):
    plan = quantconvert.plan(write_checkpoint(tmp_path / "model", config=LLAMA_CONFIG | {"model_type": model_type}))
    assert plan.format == "compressed-tensors"


def test_sizes_in_the_plan_are_the_sizes_on_disk(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", shards=2)
    plan = quantconvert.plan(source, max_shard_size="100KB")
    quantconvert.convert(source, tmp_path / "out", max_shard_size="100KB")
    for shard in plan.shards:
        assert (tmp_path / "out" / shard.file).stat().st_size == shard.nbytes
    assert plan.bits_per_quantized_weight == pytest.approx(4 + 20 / 128)


def test_digest_depends_on_what_changes_bytes_only(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model")
    base = quantconvert.plan(source).digest
    assert quantconvert.plan(source, workers=3, memory_limit="1GB").digest == base
    assert quantconvert.plan(source, group_size=64).digest != base
    write_checkpoint(source, llama_tensors() | {"extra": torch.ones(2)})
    assert quantconvert.plan(source).digest != base


def test_plan_of_many_tensors_is_json(tmp_path: Path):
    plan = quantconvert.plan(write_checkpoint(tmp_path / "model"))
    value = json.loads(json.dumps(plan.to_json()))
    assert [t["name"] for t in value["tensors"]] == [t.source.name for t in plan.tasks]
    assert value["num_tensors"] == value["num_quantized"] + sum(t["operation"] == "copy" for t in value["tensors"])


def test_patterns():
    assert template_of("model.layers.11.experts.3.w1") == "model.layers.N.experts.N.w1"
    assert compile_pattern("a.b")("a.b")
    assert not compile_pattern("a.b")("x.a.b")
    assert compile_pattern("*.down_proj")("m.layers.0.down_proj")
    assert compile_pattern(r"re:.*layers\.0\.")("m.layers.0.up")
    assert nearest("model.layers.0.mlp.dwn_proj", [f"model.layers.{i}.mlp.down_proj" for i in range(3)]) == [
        "model.layers.0.mlp.down_proj"
    ]


def test_cover_matches_exactly_the_selected_names():
    import re

    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"]
    vision = [f"vision_tower.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    for selected, others in (
        (layers, vision),
        (vision, layers),
        ([n for n in layers if ".0." in n], [n for n in layers if ".0." not in n]),
        ([n for n in layers if n.endswith("q_proj")], [n for n in layers if not n.endswith("q_proj")]),
    ):
        patterns = [re.compile(p.removeprefix("re:")) for p in cover(selected, others, FUSED)]
        assert all(any(p.match(name) for p in patterns) for name in selected)
        assert not any(p.match(name) for p in patterns for name in others)
    assert any("qkv_proj" in p for p in cover(layers, vision, FUSED))
    assert LLAMA_CONFIG["model_type"] == "llama"
