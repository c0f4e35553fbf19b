"""`iter_quantized(merged=True)`: what engines load as one layer is quantized as one matrix.

The reference is the conversion of a model that has the concatenated matrices in its files (phi3's names are the fused
ones), so that nothing of what merges here has made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.families.parallel import merged_layers
from quantconvert.families.seq2seq import WHISPER
from quantconvert.planning import memory
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint

CONFIG = LLAMA_CONFIG | {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
LAYER = "model.layers.0"
SETS = {
    f"{LAYER}.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    f"{LAYER}.mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
CASES: dict[str, dict[str, Any]] = {
    "rtn int8 tensor": {"scheme": "W8A16:tensor", "format": "rtn"},
    "rtn int4 tensor": {"scheme": "W4A16:tensor", "format": "rtn"},
    "rtn int4 channel": {"scheme": "W4A16_ASYM:channel", "format": "rtn"},
    "compressed-tensors W8A8 tensor": {"scheme": "W8A8:tensor", "format": "compressed-tensors"},
    "compressed-tensors int4": {"scheme": "W4A16_ASYM:g32", "format": "compressed-tensors"},
    "awq": {"scheme": "W4A16_ASYM:g32", "format": "awq"},
    "gptq": {"scheme": "W4A16:g32", "format": "gptq"},
}

for _options in CASES.values():
    _options["equalize"] = False  # the reference would find its factors in other rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Members of unlike sizes and ranges, so that a scale of one is not that of the set."""
    tensors = llama_tensors(hidden=256, intermediate=512, layers=1, kv=64)
    for name, times in (("self_attn.k_proj", 4), ("mlp.up_proj", 3)):
        tensors[f"{LAYER}.{name}.weight"] *= times
    return write_checkpoint(tmp_path_factory.mktemp("merged") / "model", tensors, CONFIG, shards=2)


def share(tensors: dict[str, Tensor], module: str, rank: int, size: int) -> Tensor:
    """The rows of a rank, by hand; two key/value heads serve four ranks."""
    w = tensors[f"{module}.weight"]
    if size == 4 and module.endswith(("k_proj", "v_proj")):
        rank, size = rank // 2, 2
    return w.chunk(size)[rank]


def reference(source: Path, work: Path, rank: int, size: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the merged modules, from files that hold the concatenated shares."""
    tensors = read_tensors(source)
    merged = {
        f"{name}.weight": torch.cat([share(tensors, f"{name.rpartition('.')[0]}.{m}", rank, size) for m in members])
        for name, members in SETS.items()
    }
    merged["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    write_checkpoint(work / "phi", merged, {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]})
    quantconvert.convert(work / "phi", work / "out", allow_incomplete=True, **options)
    found = read_tensors(work / "out")
    return {name: tensor for name, tensor in found.items() if name.rpartition(".")[0] in SETS}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_merged_is_the_concatenated_matrix(
    source: Path, tmp_path: Path, size: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 1 << 13)  # tiles of 32 rows: a share of 16 ends inside one
    for rank in range(size):
        found = dict(quantconvert.iter_quantized(source, tp_rank=rank, tp_size=size, merged=True, **options))
        expected = reference(source, tmp_path / str(rank), rank, size, options)
        apart = dict(quantconvert.iter_quantized(source, tp_rank=rank, tp_size=size, **options))
        assert {name for name in found if name.rpartition(".")[0] in SETS} == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        for name in found.keys() - expected.keys():
            assert torch.equal(found[name], apart[name]), name
        members = {f"{name.rpartition('.')[0]}.{m}" for name, ms in SETS.items() for m in ms}
        assert not any(name.rpartition(".")[0] in members for name in found)
        assert {name.rpartition(".")[0] for name in apart} >= members


def test_a_byte_holds_rows_of_two_members(tmp_path: Path):
    """rtn's int4 has two rows a byte: 33 rows of gate end in the middle of one."""
    tensors = llama_tensors(layers=1, intermediate=33)
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    found = dict(quantconvert.iter_quantized(source, merged=True, **CASES["rtn int4 channel"]))
    options = CASES["rtn int4 channel"]
    expected = reference(source, tmp_path, 0, 1, options)
    name = f"{LAYER}.mlp.gate_up_proj.weight"
    assert found[name].shape == (33, 128)
    assert torch.equal(found[name], expected[name])


def test_one_scale_is_that_of_the_whole(source: Path):
    tensors = read_tensors(source)
    found = dict(quantconvert.iter_quantized(source, merged=True, **CASES["rtn int8 tensor"]))
    for name, members in SETS.items():
        loudest = max(float(tensors[f"{name.rpartition('.')[0]}.{m}.weight"].abs().max()) for m in members)
        assert found[f"{name}.weight_scale"].item() == torch.tensor(loudest / 127.5).bfloat16().item()


def test_a_set_without_a_member_stays_apart(tmp_path: Path):
    tensors = llama_tensors(layers=1)
    del tensors[f"{LAYER}.mlp.up_proj.weight"]
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    found = dict(quantconvert.iter_quantized(source, merged=True, equalize=False, format="rtn", allow_incomplete=True))
    assert f"{LAYER}.mlp.gate_proj.weight_scale" in found
    assert f"{LAYER}.self_attn.qkv_proj.weight_scale" in found


def test_several_dtypes_are_refused_before_the_first_tensor(tmp_path: Path):
    tensors = llama_tensors(layers=1) | {f"{LAYER}.self_attn.k_proj.weight": weight(64, 128, dtype=torch.float32)}
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    quantconvert.iter_quantized(source, format="rtn", equalize=False)
    with pytest.raises(quantconvert.UnsupportedError, match=r"several dtypes cannot be merged.*self_attn\.qkv_proj"):
        quantconvert.iter_quantized(source, format="rtn", merged=True, equalize=False)


def test_nan_names_the_member(tmp_path: Path):
    tensors = llama_tensors(layers=1)
    tensors[f"{LAYER}.self_attn.v_proj.weight"][3, 5] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    with pytest.raises(quantconvert.CheckpointError, match=r"v_proj\.weight` in .* 1 NaN, first at \[3, 5\]"):
        dict(quantconvert.iter_quantized(source, format="rtn", merged=True, equalize=False))


def test_cross_attention_merges_keys_and_values_alone():
    stems = ("model.decoder.layers.0.self_attn", "model.decoder.layers.0.encoder_attn")
    modules = [f"{stem}.{m}_proj" for stem in stems for m in "qkv"]
    assert merged_layers(modules, WHISPER.fused) == {
        f"{stems[0]}.qkv_proj": tuple(modules[:3]),
        f"{stems[1]}.kv_proj": tuple(modules[4:]),
    }
