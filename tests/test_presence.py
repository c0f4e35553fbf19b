"""What a source lacks: a layer, a part of one, its embeddings or head. Refused, unless it is allowed by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantconvert
from quantconvert import CheckpointError, UnsupportedError
from quantconvert.checkpoint import LocalFolder, load_checkpoint
from quantconvert.families import FAMILIES, Classifier
from quantconvert.planning.presence import absent
from quantconvert.sources import find_sources
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, write_checkpoint
from tests.deepseek import entries, write_deepseek_v3

LAYERS = 4
CONFIG = LLAMA_CONFIG | {"num_hidden_layers": LAYERS}
HINT = "download the source again, whole; --allow-incomplete converts what is there"


def without(folder: Path, pattern: str, config: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    """A Llama of four layers but for the tensors that `pattern` matches."""
    tensors = {name: t for name, t in llama_tensors(layers=LAYERS).items() if not re.fullmatch(pattern, name)}
    return write_checkpoint(folder, tensors | more, CONFIG if config is None else config)


LAYER_OF_4 = "(config.json: num_hidden_layers 4)"
MISSING = {
    r"lm_head\.weight": "`lm_head` (output head; tie_word_embeddings is false)",
    r"model\.embed_tokens\.weight": "`embed_tokens` (embeddings)",
    r"model\.norm\.weight": "`norm` (final norm)",
    r"model\.layers\.1\.self_attn\.q_proj\.weight": "`model.layers.1.self_attn.q_proj.weight`",
    r"model\.layers\.[013]\.input_layernorm\.weight":
        "`model.layers.[0-1,3].input_layernorm.weight` (3 tensors)",
    r"model\.layers\.2\..*": "`model.layers.2` (a whole layer)",
    r"model\.layers\.3\..*": f"`model.layers.3` {LAYER_OF_4}",
    r"model\.layers\.[13]\..*": f"`model.layers.1` (a whole layer), `model.layers.3` {LAYER_OF_4}",
    r"(lm_head|model\.norm)\.weight":
        "`norm` (final norm), `lm_head` (output head; tie_word_embeddings is false)",
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "what"), MISSING.items(), ids=MISSING)
def test_what_is_missing_is_listed(tmp_path: Path, pattern: str, what: str):
    source = without(tmp_path / "in", pattern)
    with pytest.raises(CheckpointError) as info:
        quantconvert.convert(source, tmp_path / "out")
    assert (info.value.message, info.value.hint) == (f"`{source}` is incomplete: it lacks {what}", HINT)
    assert not (tmp_path / "out").exists()
    made = quantconvert.convert(source, tmp_path / "out", allow_incomplete=True)
    assert made.plan.notes[0] == f"--allow-incomplete: the source lacks {what}"
    assert made.plan.quantized


@pytest.mark.process
def test_the_command_line_refuses_and_allows(tmp_path: Path):
    source = without(tmp_path / "in", r"model\.norm\.weight")
    command = [sys.executable, "-m", "quantconvert", "plan", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == f"error: `{source}` is incomplete: it lacks `norm` (final norm)\n\nhint: {HINT}\n"
    done = subprocess.run([*command, "--allow-incomplete"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--allow-incomplete: the source lacks `norm` (final norm)" in " ".join(done.stdout.split())


def test_bytes_do_not_depend_on_the_permission(tmp_path: Path):
    source = without(tmp_path / "in", "nothing")
    quantconvert.convert(source, tmp_path / "a")
    quantconvert.convert(source, tmp_path / "b", allow_incomplete=True)
    names = [path.name for path in sorted((tmp_path / "a").iterdir())]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


COMPLETE: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": (r"lm_head\.weight", {"tie_word_embeddings": True}),
    "the config leaves it open": (r"lm_head\.weight", {"tie_word_embeddings": None}),
    "no head": (r"lm_head\.weight", {"architectures": ["LlamaForSequenceClassification"]}),
    "norms without weights": (r".*norm\.weight", {"model_type": "olmo"}),
    "layers of other parts by name": (r".*\.1\.self_attn\..*", {"block_configs": [{"attention": {"no_op": True}}]}),
    "layers of two kinds": (r".*\.[02]\.self_attn\.v_proj.*", {"layer_types": ["shared", "own", "shared", "own"]}),
}


@pytest.mark.parametrize(("pattern", "config"), COMPLETE.values(), ids=COMPLETE)
def test_what_is_no_gap(tmp_path: Path, pattern: str, config: dict[str, Any]):
    assert quantconvert.plan(without(tmp_path / "in", pattern, CONFIG | config)).quantized


def test_a_bare_model_has_no_head(tmp_path: Path):
    """Embedding models are saved without the prefix, under the architecture of the model they come from."""
    tensors = {name.removeprefix("model."): t for name, t in llama_tensors().items() if name != "lm_head.weight"}
    assert quantconvert.plan(write_checkpoint(tmp_path / "in", tensors)).quantized


def experts(number: int, count: int, without: str = "") -> dict[str, torch.Tensor]:
    stem = f"model.layers.{number}.mlp"
    names = [f"{stem}.gate.weight"]
    names += [f"{stem}.experts.{e}.{p}_proj.weight" for e in range(count) for p in ("gate", "up", "down")]
    return {name: torch.zeros(128, 128) for name in names if name != without}


def moe(folder: Path, *layers: dict[str, torch.Tensor], count: int = 4) -> Path:
    tensors = {n: t for n, t in llama_tensors(layers=len(layers)).items() if ".mlp." not in n}
    config = CONFIG | {"num_hidden_layers": len(layers), "model_type": "qwen3_moe", "num_experts": count}
    config["moe_intermediate_size"] = 128
    return write_checkpoint(folder, tensors | {name: t for layer in layers for name, t in layer.items()}, config)


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        ((experts(0, 4), experts(1, 3)), "`model.layers.1.mlp.experts.N.down_proj.weight`"),
        ((experts(0, 3), experts(1, 3)), "`model.layers.[0-1].mlp.experts.3.down_proj.weight` (2 tensors)"),
        (
            [experts(i, 4, without=f"model.layers.{i}.mlp.experts.2.up_proj.weight") for i in range(2)],
            "`model.layers.[0-1].mlp.experts.2.up_proj.weight` (2 tensors)",
        ),
    ],
    ids=["one layer has fewer", "all have fewer than the config says", "an expert lacks what the others have"],
)
def test_experts(tmp_path: Path, layers: list[dict[str, torch.Tensor]], what: str):
    with pytest.raises(CheckpointError) as info:
        quantconvert.plan(moe(tmp_path / "in", *layers))
    assert what.replace(".N.", ".3.") in info.value.message
    assert quantconvert.plan(moe(tmp_path / "whole", experts(0, 4), experts(1, 4))).quantized


def test_a_tower_s_layer(tmp_path: Path):
    tower = {f"vision_tower.encoder.layers.{i}.mlp.fc{j}.weight": torch.zeros(8, 8) for i in range(3) for j in (1, 2)}
    config = {"model_type": "llava", "text_config": CONFIG}
    del tower["vision_tower.encoder.layers.0.mlp.fc2.weight"]
    with pytest.raises(CheckpointError, match=r"lacks `vision_tower\.encoder\.layers\.0\.mlp\.fc2\.weight`\n"):
        quantconvert.plan(without(tmp_path / "in", "nothing", config, **tower))


def test_a_tower_of_two_kinds_of_layers(tmp_path: Path):
    """The Q-Former of BLIP-2 attends to the picture in every second layer."""
    stem = "qformer.encoder.layer"
    tower = {f"vision_tower.{stem}.{i}.output.dense.weight": torch.zeros(8, 8) for i in range(4)}
    tower |= {f"vision_tower.{stem}.{i}.crossattention.output.dense.weight": torch.zeros(8, 8) for i in (0, 2)}
    config = {"model_type": "llava", "text_config": CONFIG}
    assert quantconvert.plan(without(tmp_path / "in", "nothing", config, **tower)).quantized


def test_unknown_families_get_a_note_and_strict_fails(tmp_path: Path):
    config = CONFIG | {"model_type": "never_heard_of"}
    source = without(tmp_path / "in", r"model\.layers\.(3\..*|1\.mlp\.up_proj\.weight)", config)
    what = (
        f"by its config.json and its other layers the source may lack `model.layers.3` {LAYER_OF_4}, "
        "`model.layers.1.mlp.up_proj.weight`"
    )
    assert quantconvert.plan(source).notes[0] == f"{what}: are files missing?"
    with pytest.raises(UnsupportedError, match=r"^--strict: by its config\.json .*may lack"):
        quantconvert.plan(source, strict=True, rules="lm_head=W8A16")
    assert quantconvert.plan(source, strict=True, allow_incomplete=True, rules="lm_head=W8A16").quantized
    gap = without(tmp_path / "gap", r"model\.layers\.1\..*", config)
    with pytest.raises(CheckpointError, match=r"lacks `model\.layers\.1` \(a whole layer\)\n"):
        quantconvert.plan(gap)


def test_codes_are_counted_as_the_weights_they_are(tmp_path: Path):
    quantconvert.convert(without(tmp_path / "in", "nothing"), tmp_path / "codes", format="gptq", group_size=32)
    tensors = read_tensors(tmp_path / "codes")
    assert quantconvert.plan(tmp_path / "codes", group_size=32, requantize=True, bits=4).quantized
    left = {name: t for name, t in tensors.items() if not name.startswith("model.layers.2.mlp.up_proj.")}
    (tmp_path / "codes" / "model.safetensors").unlink()
    save_file(left, tmp_path / "codes" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks `model\.layers\.2\.mlp\.up_proj\.weight`\n"):
        quantconvert.plan(tmp_path / "codes", group_size=32, requantize=True, bits=4)


def test_deepseek_v3_is_whole(tmp_path: Path):
    """61 layers of two kinds, 256 experts, and a layer for multi-token prediction on top."""
    checkpoint = load_checkpoint(LocalFolder(write_deepseek_v3(tmp_path / "in")))
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, lambda _: b"", [])
    assert len(checkpoint.tensors) == len(list(entries()))
    assert absent(checkpoint, sources.reads, classifier) == ([], [])
    lost = ("model.layers.30.mlp.experts.17.up_proj.weight", "model.layers.2.mlp.gate_proj.weight")
    rest = [source for source in sources.reads if source.name not in lost]
    assert absent(checkpoint, rest, classifier) == ([f"`{name}`" for name in reversed(lost)], [])


def test_every_table_says_what_stands_around_its_layers():
    assert [family.name for family in FAMILIES if not family.parts] == []
