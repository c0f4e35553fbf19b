"""A plain checkpoint quantized while transformers loads it is the one that was converted first, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from quantconvert.api import convert
from quantconvert.errors import QuantConvertError, UnsupportedError
from quantconvert.integrations import rtn_loading
from quantconvert.integrations.rtn_linear import RtnLinear
from quantconvert.integrations.transformers import RtnConfig
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.engines import moe
from tests.engines.common import TINY_LLAMA, heldout_windows, load, logits

# By name: what the config is asked for, and the same as options of a conversion.
DENSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int4 g128": ({"bits": 4, "group_size": 128}, {}),
    "int4 g32 asymmetric": ({"bits": 4, "group_size": 32, "symmetric": False}, {"group_size": 32, "symmetric": False}),
    "int8 channel": ({"bits": 8, "group_size": -1}, {"bits": 8, "group_size": -1}),
    "int4 tensor": ({"bits": 4, "group_size": 0}, {"group_size": 0}),
    "mixed": (
        {
            "bits": 4, "group_size": 128, "modules_to_not_convert": [".*o_proj"],
            "overrides": {r".*layers\.0\..*": {"bits": 8}, ".*down_proj": {"group_size": -1}},
        },
        {"ignore": ["*.o_proj"], "rules": ["*.down_proj=W4A16:channel", r"re:.*layers\.0\..*=W8A16"]},
    ),
}  # fmt: skip


def both(source: Path, work: Path, asked: dict[str, Any], options: dict[str, Any], **how: Any) -> tuple[Any, Any]:
    """The model that is quantized as it loads, and the one that was converted first."""
    convert(source, work / "out", format="rtn", equalize=False, **options)
    return load(source, quantization_config=RtnConfig(**asked), **how), load(work / "out", **how)


def assert_same(found: Any, expected: Any, ids: torch.Tensor) -> None:
    """Parameters, logits and config."""
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert states[0][name].dtype == tensor.dtype, name
        assert torch.equal(states[0][name], tensor), name
    assert torch.equal(logits(found, ids), logits(expected, ids))
    assert found.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    assert not any(p.requires_grad for name, p in found.named_parameters() if ".weight_" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("asked", "options"), DENSE.values(), ids=DENSE)
def test_dense(asked: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(rtn_loading, "BLOCK_ELEMENTS", 5_000)  # several blocks a weight, the last of them smaller
    found, expected = both(TINY_LLAMA, tmp_path, asked, options, dtype=dtype)
    assert sum(isinstance(module, RtnLinear) for module in found.modules()) == (24 if "overrides" in asked else 28)
    assert_same(found, expected, heldout_windows()[:1])


@pytest.mark.parametrize("asked", [{"bits": 4, "group_size": 32, "symmetric": False}, {"bits": 8, "group_size": 0}])
@pytest.mark.parametrize("build", [moe.qwen3_moe, moe.mixtral, moe.deepseek_v3], ids=lambda build: build.__name__)
def test_experts_are_rounded_as_they_are_merged(build: Callable[[], Any], asked: dict[str, Any], tmp_path: Path):
    source = moe.save(build, tmp_path / "in")
    found, expected = both(source, tmp_path, asked, asked)
    ids = torch.arange(24).view(1, 24)
    assert_same(found, expected, ids)
    assert not torch.equal(logits(found, ids), logits(load(source), ids))
    with pytest.raises(ValueError, match="not serializable"):
        found.save_pretrained(tmp_path / "again")


def test_saved_it_is_the_converted_checkpoint(tmp_path: Path):
    asked = {"bits": 4, "group_size": 64, "symmetric": False}
    found, _ = both(TINY_LLAMA, tmp_path, asked, asked, dtype=torch.bfloat16)
    found.save_pretrained(tmp_path / "again")
    saved, converted = read_tensors(tmp_path / "again"), read_tensors(tmp_path / "out")
    assert saved.keys() == converted.keys()
    assert all(torch.equal(saved[name], converted[name]) for name in converted)
    blocks = [json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("again", "out")]
    assert blocks[0] == blocks[1]
    ids = heldout_windows()[:1]
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(load(tmp_path / "out"), ids))
    found.dequantize()
    assert not any(isinstance(module, RtnLinear) for module in found.modules())


def test_the_config_that_was_given_is_left_as_it_is():
    asked = RtnConfig(bits=4, group_size=128)
    found = load(TINY_LLAMA, quantization_config=asked)
    assert asked.modules_to_not_convert == []
    assert any(re.match(p, "lm_head") for p in found.config.quantization_config.modules_to_not_convert)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "group": ({}, {"group_size": 96}, {}, "--group-size 96 does not divide in_features of 14 weights"),
    "pattern": ({}, {"modules_to_not_convert": ["nothing"]}, {}, "matches no tensor"),
    "float32 as bfloat16": (
        {"model.layers.0.mlp.up_proj.weight": weight(256, 128, dtype=torch.float32)}, {}, {"dtype": torch.bfloat16},
        r"weights in F32 would be rounded to torch\.bfloat16 before they are quantized: `.*up_proj\.weight`",
    ),
    "incomplete": ({"model.layers.0.mlp.up_proj.weight": None}, {}, {}, "lacks|missing"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "asked", "how", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals(changes: dict[str, Any], asked: dict[str, Any], how: dict[str, Any], said: str, tmp_path: Path):
    tensors = {name: t for name, t in (llama_tensors() | changes).items() if t is not None}
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG)
    with pytest.raises(QuantConvertError, match=said):
        load(source, quantization_config=RtnConfig(**{"bits": 4, "group_size": 128} | asked), **how)


def test_nan_stops_the_loading(tmp_path: Path):
    """transformers gathers what goes wrong while it loads, logs it, and raises an error of its own."""
    tensors = llama_tensors(layers=1)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1})
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(source, quantization_config=RtnConfig(bits=4, group_size=128))


def test_weights_that_are_stored_turned_are_refused(tmp_path: Path):
    import transformers

    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match=r"not stored as plain \[out, in\] matrices"):
        load(tmp_path / "gpt2", quantization_config=RtnConfig(bits=8, group_size=-1))


def test_other_files_than_safetensors_are_refused(tmp_path: Path):
    write_checkpoint(tmp_path)
    torch.save(llama_tensors(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="safetensors files only"):
        load(tmp_path, quantization_config=RtnConfig(bits=8, group_size=-1))
