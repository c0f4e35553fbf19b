"""Where factors can move, by names and shapes alone; what is refused there, and why."""

from __future__ import annotations

from typing import Any

import pytest

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.families import FAMILIES, Family, Fold
from quantconvert.sources.read import Read, as_stored
from quantconvert.sources.sites import Site, find_sites
from quantconvert.sources.steps.scale import Heads, Scale

LAYER = {
    "input_layernorm": (64,), "post_attention_layernorm": (64,), "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2}
FACTORS = TensorRef("x", "F32", (64,), "factors", 0, 256)
KINDS = ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj")


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def reads(modules: dict[str, tuple[int, ...]], layer: str = "model.layers.0") -> list[Read]:
    """A tensor for each module: its weight, unless the name is that of a bias."""
    named = {f"{layer}.{name}" + ("" if name.endswith(".bias") else ".weight"): s for name, s in modules.items()}
    return [as_stored(TensorRef(name, "BF16", shape, "f", 0, 0)) for name, shape in named.items()]


def checkpoint(config: dict[str, Any], types: tuple[str, ...]) -> Checkpoint:
    """A checkpoint of this config: the language model's, inside of another's where there are two types."""
    whole: dict[str, Any] = config | {"model_type": types[0]}
    if len(types) > 1:
        whole = {"model_type": types[0], "text_config": config | ({"model_type": types[1]} if types[1] else {})}
    return Checkpoint("x", None, whole, None, (), (), (), (), ())


def found(
    tensors: list[Read], row: str = "llama", config: dict[str, Any] = CONFIG, types: tuple[str, ...] = ("llama",)
) -> tuple[dict[str, Site], list[str]]:
    sites, notes = find_sites(tensors, family(row), checkpoint(config, types))
    return {site.name.removeprefix("model.layers.0."): site for site in sites}, notes


def test_a_layer_of_llama():
    sites, notes = found(reads(LAYER))
    assert tuple(sites) == KINDS
    assert notes == []
    assert [read.module for read in sites["input_layernorm"].readers] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qkv"
    ]
    assert sites["self_attn.v_proj"].heads == Heads(head_dim=16, repeat=2, shared=2)
    assert (sites["self_attn.v_proj"].width, sites["mlp.up_proj"].width) == (32, 128)


@pytest.mark.parametrize("name", ["self_attn.lora_q", "mlp.router", "self_attn.indexer.wk", "mlp.experts"])
def test_a_reader_that_no_table_knows_stops_the_norms(name: str):
    """The vectors between two weights are their own."""
    shape = (4, 96, 64) if name == "mlp.experts" else (8, 64)
    sites, notes = found(reads(LAYER | {name: shape}))
    assert tuple(sites) == KINDS[2:]
    assert notes == [
        f"`{norm}` may be read by `{name}`, of which the family's table does not say (`model.layers.0`)"
        for norm in KINDS[:2]
    ]


def test_matrices_of_another_width_stop_nothing():
    sites, notes = found(reads(LAYER | {"self_attn.extra": (64, 48), "self_attn.sinks": (64,)}))
    assert (tuple(sites), notes) == (KINDS, [])


def test_masks_are_read_by_nobody():
    """Hub checkpoints of GPT-2 and its kin hold them, as wide as the longest text, which may be the model's width."""
    masks = reads({"self_attn.bias": (1, 1, 64, 64)})
    causal = as_stored(TensorRef("model.layers.0.self_attn.causal_mask", "BOOL", (1, 1, 64, 64), "f", 0, 0))
    sites, notes = found([*reads(LAYER), *masks, causal])
    assert (tuple(sites), notes) == (KINDS, [])


def test_what_reads_two_vectors_reads_neither():
    folds = (Fold("input_layernorm", ("mlp.up_proj",)), Fold("post_attention_layernorm", ("mlp.up_proj",)))
    row = Family("x", (), (), folds=folds, unfolded=(".",))
    sites, notes = find_sites(reads(LAYER), row, checkpoint(CONFIG, ("x",)))
    assert sites == []
    assert len(notes) == 2
    assert all("`model.layers.N.mlp.up_proj`, which" in note for note in notes)


@pytest.mark.parametrize(
    "config",
    [{"num_attention_heads": 4, "num_key_value_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 1},
     {"num_attention_heads": 5}, {"num_attention_heads": 3, "num_key_value_heads": 2}, {},
     {"num_attention_heads": [4, 4], "num_key_value_heads": 2}],
)  # fmt: skip
def test_heads_that_contradict_the_shapes_are_none(config: dict[str, Any]):
    sites, notes = found(reads(LAYER), config=config)
    assert set(KINDS) - set(sites) == {"self_attn.v_proj"}
    assert notes == ["`self_attn.v_proj` has heads that config.json does not explain (`model.layers.0`)"]


def test_heads_of_the_config_that_the_shapes_say_too():
    """Where the config leaves one number to the model type, the shapes have it."""
    sites, _ = found(reads(LAYER), config={"num_attention_heads": 4})
    assert sites["self_attn.v_proj"].heads == Heads(16, 2, 2)
    square, _ = found(reads(LAYER | {"self_attn.v_proj": (64, 64)}), config={})
    assert square["self_attn.v_proj"].heads == Heads(64, 1, 1)


@pytest.mark.parametrize("shape", [(48,), (64, 1), (128,)])
def test_a_norm_of_another_width_gives_something_else(shape: tuple[int, ...]):
    sites, notes = found(reads(LAYER | {"input_layernorm": shape}))
    assert set(KINDS) - set(sites) == {"input_layernorm"}
    assert notes == [f"`input_layernorm` has shape {list(shape)} before readers of 64 columns (`model.layers.0`)"]


def test_rows_have_to_be_a_whole_part():
    sites, notes = found(reads(LAYER | {"mlp.up_proj": (160, 64)}))
    assert "mlp.up_proj" not in sites
    assert notes == ["`mlp.up_proj` has shape [160, 64] before readers of 128 columns (`model.layers.0`)"]


@pytest.mark.parametrize(
    ("types", "expected"),
    [(("llava", "mistral"), KINDS), (("llava", "phi3"), ()), (("llava", ""), ()), (("gemma3", "llama"), KINDS)],
)
def test_the_language_model_decides(types: tuple[str, ...], expected: tuple[str, ...]):
    """Another one inside may have the same names and a norm of another kind."""
    sites, _ = found(reads(LAYER), "vision-language", types=types)
    assert tuple(sites) == expected


def test_towers_are_left_alone():
    tower = reads(LAYER, "vision_model.model.layers.0")
    mtp = reads(LAYER, "mtp.layers.0")
    sites, notes = found([*tower, *mtp, *reads(LAYER)], "vision-language", types=("qwen3_vl", ""))
    assert notes == []
    assert tuple(sites) == KINDS
    assert all(site.name.startswith("model.layers.0.") for site in sites.values())


def test_layers_that_predict_a_second_token_raise_no_doubt():
    mtp = {"eh_proj": (64, 128), "embed_tokens": (96, 64), "shared_head.head": (96, 64), "enorm": (64,)}
    latent = {name: shape for name, shape in LAYER.items() if "self_attn" not in name}
    _, notes = found(reads(latent | mtp), "deepseek", types=("deepseek_v3",))
    assert notes == []


def test_numbers_of_experts_are_the_givers_own():
    experts = {f"mlp.experts.{i}.{name}_proj": (48, 64) for i in range(3) for name in ("gate", "up")}
    down = {f"mlp.experts.{i}.down_proj": (64, 48) for i in range(3)}
    attention = {name: shape for name, shape in LAYER.items() if not name.startswith("mlp.")}
    tensors = reads(attention | experts | down | {"mlp.gate": (3, 64)})
    sites, notes = found(tensors, "qwen-moe", types=("qwen3_moe",))
    assert notes == []
    assert [read.module[15:] for read in sites["mlp.experts.1.up_proj"].readers] == ["mlp.experts.1.down_proj"]
    assert len(sites["post_attention_layernorm"].readers) == 7


def test_a_bias_beside_one_and_a_weight_is_only_multiplied():
    nemotron = {name: shape for name, shape in LAYER.items() if "gate" not in name} | {"input_layernorm.bias": (64,)}
    sites, _ = found(reads(nemotron), types=("nemotron",))
    steps = dict(sites["input_layernorm"].steps(FACTORS))
    assert steps["model.layers.0.input_layernorm.weight"] == Scale(FACTORS, "1 + vector")
    assert steps["model.layers.0.input_layernorm.bias"] == Scale(FACTORS, "vector")
    assert steps["model.layers.0.self_attn.q_proj.weight"] == Scale(FACTORS, "columns")


def test_the_last_rows_of_fused_weights():
    fused = {"self_attn.qkv_proj": (128, 64), "self_attn.o_proj": (64, 64), "self_attn.qkv_proj.bias": (128,)}
    mlp = {"mlp.gate_up_proj": (256, 64), "mlp.down_proj": (64, 128)}
    sites, notes = found(reads(fused | mlp), "phi3", types=("phi3",))
    assert notes == []
    assert {name: (site.start, site.width) for name, site in sites.items()} == {
        "self_attn.qkv_proj": (96, 32), "mlp.gate_up_proj": (128, 128),
    }  # fmt: skip
    assert dict(sites["self_attn.qkv_proj"].steps(FACTORS))["model.layers.0.self_attn.qkv_proj.bias"] == Scale(
        FACTORS, "vector", 96
    )


def test_conditions_on_the_config():
    """Keys inside of others, keys that are not there."""
    layer = {"norm_1": (64,), "attn.Wqkv": (192, 64), "attn.out_proj": (64, 64)}
    for config, expected in (
        ({}, {"norm_1", "attn.Wqkv"}),
        ({"attn_config": {"clip_qkv": None}}, {"norm_1", "attn.Wqkv"}),
        ({"attn_config": {"clip_qkv": 8}}, {"norm_1"}),
    ):
        sites, notes = found(reads(layer), "mpt", config=config, types=("mpt",))
        assert (set(sites), notes) == (expected, [])


def test_nothing_of_families_without_a_table():
    assert find_sites(reads(LAYER), None, checkpoint(CONFIG, ("x",))) == ([], [])


@pytest.mark.parametrize("row", [family for family in FAMILIES if family.folds], ids=lambda family: family.name)
def test_names_in_tables_are_well_formed(row: Family):
    """What a fold names is a module of a layer, without `.weight`; no reader gives what it reads itself."""
    for fold in row.folds:
        for name in (fold.producer, *fold.readers):
            assert all(part.replace("_", "").isalnum() for part in name.split("."))
            assert not name.endswith("weight")
        assert fold.producer not in fold.readers
        assert len(set(fold.readers)) == len(fold.readers)
