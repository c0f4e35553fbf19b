"""Mixtures of experts and hybrids: every family's rows against a tiny model of transformers' own making."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from quantconvert.card import load_hint
from quantconvert.checkpoint import LocalFolder, TensorRef, load_checkpoint
from quantconvert.families import Classifier, Role
from quantconvert.patterns import compile_pattern
from tests.builders import read_tensors, write_checkpoint
from tests.engines.common import load, write_reference
from tests.engines.decoding import decode_all
from tests.engines.families import (
    TOLERANCE,
    Case,
    assert_awq_is_close,
    assert_close,
    assert_selection,
    convert,
    outputs,
    save,
)
from tests.engines.moe_families import (
    CASES,
    FUSED,
    Fused,
    assert_dims,
    config_of,
    hub_config,
    hub_tensors,
    join,
    rewrite,
    take_apart,
)

ALL: dict[str, Case] = CASES | {name: family.case for name, family in FUSED.items()}
# transformers 5.23 reads experts one by one where its `conversion_mapping.py` merges them ("qwen2_moe", "mixtral") or,
# for Llama 4, where it swaps in a list of modules (`quantizers/base.py`, MODULES_TO_PATCH_FOR_QUANTIZATION). For
# gpt-oss, Granite and Qwen3-VL it knows only the fused tensors: what is written there is compared tensor by tensor.
UNREADABLE = FUSED.keys() - {"qwen3_5_moe", "llama4"}
LISTED = {"llama4"}  # experts that stay modules, and multiply in the dtype asked for


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with an expert a tensor, made once a family."""

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            work = tmp_path_factory.mktemp(name.split(",")[0])
            source = save(ALL[name], work / "saved")
            if name in FUSED:
                hub, config = hub_tensors(name, source), hub_config(name, config_of(source))
                rewrite(source, work / "hub", hub, config)
                source = rewrite(source, work / "parts", take_apart(FUSED[name], hub), config)
            self[name] = source
            return source

    return Made()


@pytest.mark.parametrize("name", ALL)
def test_selection(name: str, folders: Mapping[str, Path]):
    assert_selection(ALL[name], folders[name], group_size=32, format="compressed-tensors")


@pytest.mark.parametrize("name", FUSED)
def test_nothing_two_dimensional_is_guessed_beside_fused_experts(name: str, folders: Mapping[str, Path]):
    assert folders[name].name == "parts"
    roles = roles_of(folders[name].with_name("hub"), lambda ref: len(ref.shape) == 2)
    guessed = {key for key, role in roles.items() if not role.by_table and role.reason != "embedding"}
    assert len(roles) > 10
    assert not guessed


def roles_of(folder: Path, wanted: Callable[[TensorRef], bool]) -> dict[str, Role]:
    checkpoint = load_checkpoint(LocalFolder(folder))
    classifier = Classifier(checkpoint)
    return {ref.name: classifier.role(ref) for ref in checkpoint.tensors if wanted(ref)}


@pytest.mark.parametrize("name", ALL)
def test_config_says_the_shapes_of_experts(name: str, folders: Mapping[str, Path]):
    rows = assert_dims(folders[name])
    assert len(rows) >= 2
    assert any("experts" in row for row in rows) == (name not in ("qwen3_5", "qwen3_5_text"))


@pytest.mark.parametrize("name", ALL)
def test_awq(name: str, folders: Mapping[str, Path], tmp_path):
    folder = convert(folders[name], tmp_path / "awq", format="awq")
    assert_awq_is_close(folders[name], folder)


@pytest.mark.parametrize("name", [name for name in ALL if name not in UNREADABLE])
def test_transformers_loads(name: str, folders: Mapping[str, Path], tmp_path):
    if "gptqmodel" in sys.modules:
        pytest.skip("GPTQModel replaces transformers' experts in its process: run this file by itself")
    case, source = ALL[name], folders[name]
    folder = convert(source, tmp_path / "packed", format="compressed-tensors")
    decoded = decoded_as_loaded(folder, merged=name not in LISTED)
    reference = write_reference(source, folder, tmp_path / "reference", decoded)
    hub = source.with_name("hub") if name in LISTED else source
    if name in LISTED:
        write_checkpoint(reference, join(FUSED[name], read_tensors(hub), read_tensors(reference)), config_of(hub))
    found, expected, original = (outputs(case, in_float32(load(f, case.model))) for f in (folder, reference, hub))
    assert any((a - b).abs().max() > 100 * TOLERANCE for a, b in zip(original, expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def decoded_as_loaded(folder: Path, merged: bool) -> dict[str, Tensor]:
    """Experts that transformers merges while it loads have the stored dtype's rounding; the others are float32."""
    stored, wide = decode_all(folder), decode_all(folder, torch.float32)
    return {name: stored[name] if merged and ".experts." in name else wide[name] for name in stored}


def in_float32(model: Any) -> Any:
    """transformers leaves merged experts in the stored dtype, whatever was asked."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    return model


# Llama 4's experts are modules for compressed-tensors only.
RANDOM = [(name, format) for name in sorted(UNREADABLE) for format in ("compressed-tensors", "rtn")] + [
    ("llama4", "rtn")
]


@pytest.mark.parametrize(("name", "format"), RANDOM)
def test_experts_that_load_as_random_numbers_are_told(name: str, format: str, folders: Mapping[str, Path], tmp_path):
    """What the rows of `engines/transformers.py` say: the load ends without an error, with experts missing."""
    if "gptqmodel" in sys.modules:
        pytest.skip("GPTQModel replaces transformers' experts in its process: run this file by itself")
    import quantconvert.integrations.transformers

    plan = quantconvert.plan(folders[name], group_size=32, format=format)
    assert any("experts" in note and "random numbers" in note for note in plan.notes)
    assert not any("from_pretrained" in line for line in load_hint(plan, "out"))
    folder = convert(folders[name], tmp_path / "out", format=format)
    with pytest.raises(AssertionError, match=r"missing_keys.*experts\.(gate_up|down)_proj"):
        load(folder, ALL[name].model)


@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_values_where_transformers_cannot_load(name: str, folders: Mapping[str, Path], tmp_path):
    """Every decoded weight lies within half a step of its own; biases are untouched."""
    folder = convert(folders[name], tmp_path / "packed", format="compressed-tensors")
    tensors, originals = read_tensors(folder), read_tensors(folders[name])
    decoded = decode_all(folder)
    assert any(".experts.3.down_proj" in module for module in decoded)
    assert_close(folders[name], decoded, tensors, "weight_scale")
    for bias in (bias for bias in originals if bias.endswith(".bias")):
        assert torch.equal(tensors[bias], originals[bias])


@pytest.mark.parametrize("format", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_become_what_their_parts_become(name: str, format: str, folders: Mapping[str, Path], tmp_path):
    parts = folders[name]
    expected = read_tensors(convert(parts, tmp_path / "parts", format=format))
    found = read_tensors(convert(parts.with_name("hub"), tmp_path / "fused", format=format))
    assert found.keys() == expected.keys()
    for tensor in found:
        assert torch.equal(found[tensor], expected[tensor]), tensor


# A second token is predicted by one more layer, after the last or under `mtp`; its name, and where its copy comes from.
MTP = {
    "deepseek_v3": ("model.layers.2", "model.layers.1"),
    "glm4_moe": ("model.layers.2", "model.layers.1"),
    "qwen3_next": ("mtp.layers.0", "model.layers.1"),
    "qwen3_5": ("mtp.layers.0", "model.language_model.layers.1"),
    "qwen3_5_moe": ("mtp.layers.0", "model.language_model.layers.1"),
}


def with_mtp(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own, copied = MTP[name]
    found = {own + key.removeprefix(copied): tensor for key, tensor in tensors.items() if key.startswith(f"{copied}.")}
    wide = torch.ones(64, 128, dtype=torch.bfloat16)
    extra = ("eh_proj", "shared_head.head", "embed_tokens") if own[:3] != "mtp" else ()
    found |= {f"{own}.{part}.weight": wide for part in extra}
    return found | ({} if extra else {"mtp.fc.weight": wide})


@pytest.mark.parametrize("name", MTP)
def test_layers_that_predict_a_second_token_stay(name: str, folders: Mapping[str, Path], tmp_path):
    tensors = read_tensors(folders[name])
    mtp = with_mtp(name, tensors)
    config = config_of(folders[name]) | {"num_nextn_predict_layers": 1}
    folder = rewrite(folders[name], tmp_path / "mtp", tensors | mtp, config)
    found = read_tensors(convert(folder, tmp_path / "out", format="compressed-tensors"))
    roles = roles_of(folder, lambda ref: ref.name in mtp)
    assert len(mtp) > 10
    for key, tensor in mtp.items():
        assert torch.equal(found[key], tensor), key
        assert (roles[key].reason, roles[key].by_table) == ("mtp", True), key
    patterns = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    matches = [compile_pattern(pattern) for pattern in patterns]
    for key in mtp.keys() | decode_all(tmp_path / "out").keys():
        module = key.removesuffix(".weight")
        linear = key not in mtp or (mtp[key].dim() == 2 and not key.endswith("embed_tokens.weight"))
        assert not linear or any(match(module) for match in matches) == (key in mtp), key


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_parts_that_only_such_a_layer_has_are_known_by_name(name: str, folders: Mapping[str, Path], tmp_path):
    """Where the config says nothing of it."""
    tensors = read_tensors(folders[name])
    config = {key: value for key, value in config_of(folders[name]).items() if "nextn" not in key}
    folder = rewrite(folders[name], tmp_path / "mtp", tensors | with_mtp(name, tensors), config)
    roles = roles_of(folder, lambda ref: ref.name.endswith(("eh_proj.weight", "shared_head.head.weight")))
    assert [(role.reason, role.by_table) for role in roles.values()] == [("mtp", True)] * 2


def test_fused_experts_of_the_second_token_stay(folders: Mapping[str, Path], tmp_path):
    tensors = read_tensors(folders["qwen3_5_moe"].with_name("hub"))
    mtp = with_mtp("qwen3_5_moe", tensors)
    folder = rewrite(folders["qwen3_5_moe"], tmp_path / "mtp", tensors | mtp)
    found = read_tensors(convert(folder, tmp_path / "out", format="compressed-tensors"))
    assert mtp["mtp.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    for key, tensor in mtp.items():
        assert torch.equal(found[key], tensor), key


def test_kimi_k2_is_deepseek_v3_by_another_name(folders: Mapping[str, Path], tmp_path):
    """Its modelling code lies on the Hub, with DeepSeek-V3's names and shapes."""
    source = folders["deepseek_v3"]
    config = config_of(source) | {"model_type": "kimi_k2"}
    folder = rewrite(source, tmp_path / "kimi", read_tensors(source), config)
    assert_selection(CASES["deepseek_v3"], folder, group_size=32, format="compressed-tensors")
    found = read_tensors(convert(folder, tmp_path / "out", format="compressed-tensors"))
    expected = read_tensors(convert(source, tmp_path / "deepseek", format="compressed-tensors"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", FUSED)
def test_take_apart_and_join_are_inverse(name: str, folders: Mapping[str, Path]):
    """So that a mistake in either shows without a converter."""
    family: Fused = FUSED[name]
    hub = read_tensors(folders[name].with_name("hub"))
    assert any(tensor.dim() == 3 and tensor.shape[0] == 4 for tensor in hub.values())
    joined = join(family, hub, read_tensors(folders[name]))
    assert joined.keys() == hub.keys()
    assert all(torch.equal(joined[key], hub[key]) for key in hub)
