"""Schemes by rule, preset and recipe; fused sets and experts; what each layout's config then says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.planning import Plan
from quantconvert.recipe import merged, read_recipe, write_recipe
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint

LAYERS = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", llama_tensors(layers=LAYERS), LLAMA_CONFIG | {"num_hidden_layers": 3})


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    tensors = {"model.embed_tokens.weight": torch.zeros(64, 128), "lm_head.weight": torch.zeros(64, 128)}
    for i in range(2):
        layer = f"model.layers.{i}"
        names = [f"self_attn.{p}_proj" for p in "qkvo"] + ["mlp.gate"]
        names += [f"mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")]
        tensors |= {f"{layer}.{name}.weight": torch.zeros(64 if name != "mlp.gate" else 2, 128) for name in names}
    return write_checkpoint(tmp_path / "moe", tensors, {"model_type": "qwen3_moe", "num_hidden_layers": 2})


def labels(plan: Plan) -> dict[str, str]:
    return {
        task.source.name.removesuffix(".weight"): task.scheme.label if task.scheme else str(task.reason)
        for task in plan.tasks
    }


def matched(config: dict, module: str) -> str | None:
    """The compressed-tensors group of a module, matched as compressed-tensors does; None where it is ignored."""

    def hit(targets: list[str]) -> bool:
        return any(re.match(t[3:], module) if t.startswith("re:") else t in (module, "Linear") for t in targets)

    if any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in config["ignore"]):
        return None
    return next((name for name, group in config["config_groups"].items() if hit(group["targets"])), None)


def test_later_rules_win_and_ignore_is_last(source: Path):
    plan = quantconvert.plan(
        source,
        rules=["*.mlp.*=W8A16", "*.down_proj=W4A16:g64", "re:.*layers\\.1\\.mlp\\.down.*=W8A16:channel"],
        ignore=["*.layers.2.self_attn.*"],
    )
    found = labels(plan)
    assert found["model.layers.0.mlp.up_proj"] == "int8 g128 symmetric"
    assert found["model.layers.0.mlp.down_proj"] == "int4 g64 symmetric"
    assert found["model.layers.1.mlp.down_proj"] == "int8 per channel symmetric"
    assert found["model.layers.0.self_attn.o_proj"] == "int4 g128 symmetric"
    assert found["model.layers.2.self_attn.q_proj"] == "ignored"
    assert plan.format == "compressed-tensors"
    config = plan.quantization_config
    assert config
    groups: dict[str, set[str]] = {}
    for task in plan.tasks:
        module = task.source.name.removesuffix(".weight")
        if task.scheme:
            groups.setdefault(str(matched(dict(config), module)), set()).add(task.scheme.label)
        elif "_proj" in module:
            assert matched(dict(config), module) is None
    assert sorted(map(len, groups.values())) == [1, 1, 1, 1], "each group stands for one scheme"
    assert "None" not in groups


@pytest.mark.parametrize("preset", ["first-last-8", "down-8"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "rtn"])
def test_presets(source: Path, preset: str, layout: str):
    plan = quantconvert.plan(source, preset=preset, format=layout, bits=4)
    found = labels(plan)
    eight = {name for name, label in found.items() if label.startswith("int8")}
    if preset == "down-8":
        assert eight == {f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)}
    else:
        assert eight == {n for n in found if re.search(r"layers\.(0|2)\.", n) and "_proj" in n}
    assert 4 < plan.bits_per_quantized_weight < 8.5


def test_preset_for_experts(moe: Path):
    plan = quantconvert.plan(moe, preset="experts-4-rest-8")
    for name, label in labels(plan).items():
        if ".experts." in name:
            assert label == "int4 g128 symmetric"
        elif "self_attn" in name:
            assert label == "int8 g128 symmetric"
    assert labels(plan)["model.layers.0.mlp.gate"] == "router"


def test_unknown_preset(source: Path):
    with pytest.raises(quantconvert.UsageError, match="--preset: unknown preset `x`"):
        quantconvert.plan(source, preset="x")


def test_fused_sets_must_share_a_scheme(source: Path):
    with pytest.raises(quantconvert.UnsupportedError) as caught:
        quantconvert.plan(source, rules=["*.q_proj=W8A16"])
    assert caught.value.message == (
        "`model.layers.0.self_attn`: engines load q_proj, k_proj, v_proj as one qkv_proj, "
        "so that they need one scheme, got q_proj: int8 g128 symmetric, k_proj: int4 g128, v_proj: int4 g128"
    )
    hint = str(caught.value.hint)
    assert hint == r"give all of them the widest: --rule 're:.*self_attn\.(q_proj|k_proj|v_proj)$=W8A16:g128'"
    widened = quantconvert.plan(source, rules=["*.q_proj=W8A16", hint.partition("'")[2].rstrip("'")])
    assert labels(widened)["model.layers.2.self_attn.v_proj"] == "int8 g128 symmetric"


def test_experts_of_a_layer_must_share_a_scheme(moe: Path):
    with pytest.raises(quantconvert.UnsupportedError, match="one scheme for all experts of a layer"):
        quantconvert.plan(moe, rules=["model.layers.0.mlp.experts.*.down_proj=W8A16"])
    plan = quantconvert.plan(moe, rules=["model.layers.0.mlp.experts.*=W8A16"])
    assert labels(plan)["model.layers.0.mlp.experts.1.up_proj"] == "int8 g128 symmetric"
    assert labels(plan)["model.layers.1.mlp.experts.1.up_proj"] == "int4 g128 symmetric"


def test_rules_that_match_nothing_or_do_not_parse(source: Path):
    with pytest.raises(quantconvert.UsageError) as caught:
        quantconvert.plan(source, rules=["*.dwn_proj=W8A16"])
    assert caught.value.message == "--rule `*.dwn_proj=W8A16` matches no tensor"
    assert "down_proj" in str(caught.value.hint)
    for rule, message in (
        ("no equals sign", "--rule: expected PATTERN=SCHEME"),
        ("*.o_proj=W5A16", "--rule: unknown scheme `W5A16`"),
        ("*.o_proj=", "--rule: expected PATTERN=SCHEME"),
    ):
        with pytest.raises(quantconvert.UsageError, match=message):
            quantconvert.plan(source, rules=[rule])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("down_proj", f"--ignore '*.down_proj' matches {LAYERS} modules"),
        ("self_attn", f"--ignore '*.self_attn.*' matches {4 * LAYERS} modules"),
        ("model.layers.0", "--ignore 'model.layers.0.*' matches 9 modules"),
        ("nothing.*", "`quantconvert plan SRC --explain` lists the names"),
    ],
)
def test_a_part_of_a_name_is_answered_with_its_glob(source: Path, pattern: str, hint: str):
    """As transformers' `modules_to_not_convert` takes it; the glob of the hint then works."""
    with pytest.raises(quantconvert.UsageError) as caught:
        quantconvert.plan(source, ignore=pattern)
    assert str(caught.value.hint).endswith(hint)
    if "'" in hint:
        assert quantconvert.plan(source, ignore=hint.split("'")[1])


def test_a_layout_that_holds_one_scheme_names_one_that_holds_more(source: Path):
    with pytest.raises(quantconvert.UnsupportedError) as caught:
        quantconvert.plan(source, rules=["*.down_proj=W4A16:g64"], format="awq", symmetric=True)
    assert caught.value.message.startswith("awq holds one scheme for the whole model")
    assert caught.value.hint == "--format compressed-tensors"


def test_lm_head_only_when_named(source: Path, tmp_path: Path):
    assert labels(quantconvert.plan(source, rules=["*=W8A16"]))["lm_head"] == "lm_head"
    plan = quantconvert.plan(source, rules=["lm_head=W8A16"])
    assert labels(plan)["lm_head"] == "int8 g128 symmetric"
    config = dict(plan.quantization_config or {})
    assert matched(config, "lm_head") == matched(config, "lm_head")
    assert "lm_head" not in config["ignore"]
    assert any(t == r"re:.*lm_head$" for g in config["config_groups"].values() for t in g["targets"])
    gptq = quantconvert.plan(source, rules=["lm_head=W8A16"], format="gptq")
    assert (gptq.quantization_config or {})["lm_head"] is True
    with pytest.raises(quantconvert.QuantConvertError, match="AWQ engines read lm_head in high precision only"):
        quantconvert.plan(source, rules=["lm_head=W4A16_ASYM"], format="awq")
    tied = write_checkpoint(tmp_path / "tied", llama_tensors(), LLAMA_CONFIG | {"tie_word_embeddings": True})
    with pytest.raises(quantconvert.UnsupportedError, match="tied to the embeddings"):
        quantconvert.plan(tied, rules=["lm_head=W8A16"])


def test_gptq_dynamic_matches_fused_and_unfused_names(source: Path):
    plan = quantconvert.plan(source, preset="first-last-8", format="gptq", ignore=["*.layers.1.self_attn.*"])
    config = dict(plan.quantization_config or {})
    base = config["bits"]

    def bits(module: str) -> int | None:
        for pattern, fields in config["dynamic"].items():
            if re.match(pattern[2:], module):
                return None if pattern.startswith("-:") else fields["bits"]
        return base

    for task in plan.tasks:
        module = task.source.name.removesuffix(".weight")
        if "_proj" in module:
            assert bits(module) == (task.scheme.num_bits if task.scheme else None), module
    assert bits("model.layers.0.self_attn.qkv_proj") == 8
    assert bits("model.layers.1.self_attn.qkv_proj") is None
    assert bits("model.layers.1.mlp.gate_up_proj") == 4
    assert bits("lm_head") is None


def test_recipe_round_trip(source: Path, tmp_path: Path):
    options: dict[str, Any] = {
        "scheme": "W4A16:g64",
        "format": "compressed-tensors",
        "rules": ["*.down_proj=W8A16", 're:.*\\.(o)_proj$=skip'],
        "ignore": ("*.layers.0.mlp.*",),
        "on_indivisible": "skip",
    }  # fmt: skip
    plan = quantconvert.plan(source, **options)
    path = tmp_path / "recipe.toml"
    path.write_text(write_recipe(plan.job, plan.format))
    again = quantconvert.plan(source, **read_recipe(path))
    assert again.job == plan.job
    assert again.digest == plan.digest
    more = merged(read_recipe(path), {"rules": ("*.o_proj=W8A16",), "ignore": None, "bits": None})
    assert labels(quantconvert.plan(source, **more))["model.layers.1.self_attn.o_proj"] == "int8 g64 symmetric"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed = 3", "has unknown key `speed`"),
        ("[[rule]]\npattern = 'x'", "needs exactly `pattern` and `scheme`"),
        ("x = ", "is not TOML"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(quantconvert.UsageError, match=re.escape(message)):
        read_recipe(tmp_path / "r.toml")
    with pytest.raises(quantconvert.UsageError, match="cannot read"):
        read_recipe(tmp_path / "missing.toml")


def test_fused_3d_experts_are_kept_and_said(tmp_path: Path):
    """Without a table nobody knows their axes: no AWQ for experts, and the config leaves the experts alone."""
    tensors = llama_tensors(layers=1) | {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 64, 128),
        "model.layers.0.mlp.experts.down_proj": torch.zeros(2, 128, 32),
        "model.layers.0.mlp.gate.weight": torch.zeros(2, 128),
    }
    source = write_checkpoint(tmp_path / "fused", tensors, {"model_type": "an_unknown_moe"})
    with pytest.raises(quantconvert.UnsupportedError, match=r"2 fused expert tensors such as .* stay in high"):
        quantconvert.plan(source)
    plan = quantconvert.plan(source, allow_kept_experts=True)
    assert plan.format == "compressed-tensors"
    assert r"re:.*layers\.\d+\.mlp\.experts$" in (plan.quantization_config or {})["ignore"]
    assert any("fused expert tensors" in note for note in plan.notes)


def test_gptq_experts_are_named_as_engines_ask(moe: Path):
    plan = quantconvert.plan(moe, rules=["model.layers.0.mlp.experts.*=W8A16"], format="gptq")
    config = dict(plan.quantization_config or {})
    assert r"+:.*layers\.(0)\.mlp\.experts(\..*)?$" in config["dynamic"]
    assert all("experts" not in names[0] for names in config["modules_in_block_to_quantize"])


def test_awq_names_fused_layers_that_are_kept(source: Path):
    plan = quantconvert.plan(source, ignore=["*.layers.0.self_attn.*"], format="awq")
    assert "model.layers.0.self_attn.qkv_proj" in (plan.quantization_config or {})["modules_to_not_convert"]


def test_command_line_scheme_wins_over_a_recipe_s_bits(source: Path):
    assert merged({"bits": 4, "group_size": 64}, {"scheme": "W8A16"})["scheme"] == "W8A16"
    plan = quantconvert.plan(source, **merged({"bits": 4, "group_size": 64}, {"scheme": "W8A16"}))
    assert labels(plan)["model.layers.0.mlp.up_proj"] == "int8 g128 symmetric"
    assert "scheme" not in merged({"scheme": "W8A16"}, {"bits": 4})


def test_a_rule_that_names_what_is_never_quantized_is_refused(source: Path):
    with pytest.raises(quantconvert.UnsupportedError, match=r"embed_tokens\.weight` stays in high precision"):
        quantconvert.plan(source, rules=["model.embed_tokens=W8A16"])
    with pytest.raises(quantconvert.UnsupportedError, match=r"stays in high precision: normalisation"):
        quantconvert.plan(source, rules=["model.norm=W8A16"])


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ("*.experts.0.up_proj=W8A16", "*.mlp.experts.*"),
        ("model.layers.1.mlp.experts.0.up_proj=W8A16", "model.layers.1.mlp.experts.*"),
    ],
)
def test_the_hint_about_experts_is_one_and_enough(moe: Path, rule: str, pattern: str):
    with pytest.raises(quantconvert.UnsupportedError) as info:
        quantconvert.plan(moe, rules=[rule])
    hint = str(info.value.hint)
    assert hint == f"give all of them the widest: --rule '{pattern}=W8A16:g128'"
    plan = quantconvert.plan(moe, rules=[rule, hint.partition("'")[2].rstrip("'")])
    eight = {name for name, label in labels(plan).items() if label.startswith("int8")}
    layers = "01" if pattern.startswith("*") else "1"
    assert eight == {name for name in labels(plan) if re.match(rf"model\.layers\.[{layers}]\.mlp\.experts\.", name)}


def test_the_hint_about_experts_that_are_ignored(moe: Path):
    with pytest.raises(quantconvert.UnsupportedError) as info:
        quantconvert.plan(moe, ignore=["*.experts.0.up_proj"])
    assert str(info.value.hint) == "keep all of them: --ignore '*.mlp.experts.*'"
    assert quantconvert.plan(moe, ignore=["*.experts.0.up_proj", "*.mlp.experts.*"]).quantized


def test_first_and_last_of_an_encoder_and_a_longer_decoder(tmp_path: Path):
    names = [f"encoder.block.{i}.layer.{j}.SelfAttention.q.weight" for i in range(4) for j in range(1)]
    names += [f"decoder.block.{i}.layer.{j}.EncDecAttention.q.weight" for i in range(6) for j in range(3)]
    config = {"model_type": "t5", "num_layers": 4, "num_decoder_layers": 6}
    tensors = {name: torch.zeros(64, 128) for name in names}
    source = write_checkpoint(tmp_path / "t5", tensors, config)
    plan = quantconvert.plan(source, preset="first-last-8", allow_incomplete=True)
    eight = {name for name, label in labels(plan).items() if label.startswith("int8")}
    outer = r"(encoder\.block\.[03]|decoder\.block\.[05])\."
    assert eight == {name.removesuffix(".weight") for name in names if re.match(outer, name)}


def test_names_of_multi_token_prediction_spare_no_others(tmp_path: Path):
    tensors = llama_tensors() | {"mtp.fc.weight": torch.zeros(128, 256), "mtp.layers.0.mlp.fc.weight": torch.ones(8, 8)}
    config = LLAMA_CONFIG | {"model_type": "qwen3_next"}
    plan = quantconvert.plan(write_checkpoint(tmp_path / "mtp", tensors, config), format="compressed-tensors")
    assert plan.quantization_config
    assert plan.quantization_config["ignore"] == ["lm_head", r"re:.*mtp\.fc$", r"re:.*mtp\.layers\.\d+\.mlp\.fc$"]
