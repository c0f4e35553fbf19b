"""A rotated model computes what the source does, in transformers, to float32's error; and so after quantization."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.families import FAMILIES
from tests.builders import read_tensors, write_checkpoint
from tests.engines.dense_families import CASES as DENSE
from tests.engines.families import Case
from tests.engines.moe_families import CASES as MOE
from tests.engines.stepped import apply_steps, logits, save_float32

# Values are part of a fused projection, or may be clamped.
NO_VALUES = ("phi3", "olmoe")
TYPES = {name for family in FAMILIES for stream in family.streams for name in stream.only}


def with_config(name: str, **more: Any) -> Case:
    case = (DENSE | MOE)[name]
    return replace(case, config=case.config | more)


CASES = {name: case for name, case in (DENSE | MOE).items() if name.split(" ")[0] in TYPES and "reward" not in name}
CASES |= {
    "llama odd": with_config("llama", hidden_size=96, head_dim=24),
    "llama one kv head": with_config("llama", num_key_value_heads=1),
    "llama blocks": with_config("llama", hidden_size=100, head_dim=20),
    "qwen3 tied": with_config("qwen3", tie_word_embeddings=True),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_rotated_model_is_the_same_model(name: str, tmp_path: Path):
    case = CASES[name]
    source = save_float32(case, tmp_path / "source")
    rotations = ("r1",) if name.split(" ")[0] in NO_VALUES else ("r1", "r2", "r1,r2")
    expected = logits(case, source)
    before = read_tensors(source)
    for rotation in rotations:
        folder = apply_steps(source, tmp_path / rotation, scheme="W8A8", rotate=rotation)
        after = read_tensors(folder)
        assert relative(logits(case, folder), expected) < 1e-5
        changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
        assert any("o_proj" in key for key in changed)
        assert any("embed_tokens" in key for key in changed) == ("r1" in rotation)
        if rotation == "r2":
            continue
        assert "lm_head.weight" in after
        norms = [key for key in after if re.search(r"layers\.\d+\.\w+norm\.weight$|model\.norm\.weight$", key)]
        assert len(norms) == 5
        assert all(len(after[key].unique()) == 1 for key in norms)
        # a vector of the stream is turned, and no longer than it was
        table = next(key for key in after if key.endswith("embed_tokens.weight"))
        torch.testing.assert_close(after[table].norm(dim=1), before[table].norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen2_moe", "gemma", "deepseek_v3"])
def test_a_rotation_is_nothing_beside_the_rounding_of_bfloat16(name: str, tmp_path: Path):
    case = CASES[name]
    source = save_float32(case, tmp_path / "source")
    expected = logits(case, source)
    folder = apply_steps(source, tmp_path / "rotated", scheme="W8A8", rotate="r1,r2")
    ours = relative(logits(case, folder), expected)
    theirs = relative(logits(case, source, torch.bfloat16), expected)
    print(f"{name}: rotated by {ours:.1e}, bfloat16 by {theirs:.1e}: {ours / theirs:.1e}")
    assert ours < 1e-3 * theirs


QUANTIZED = ("llama tied", "qwen2", "qwen3 tied", "mixtral", "qwen2_moe", "deepseek_v3", "gemma")


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_rotated_model_is_near_after_quantization(name: str, tmp_path: Path):
    """The whole way: codes, verification, the config that goes with them, and back to plain weights."""
    case = CASES[name]
    source = save_float32(case, tmp_path / "source")
    rotation: Any = {"scheme": "W8A8", "rotate": "r1,r2"}
    quantconvert.convert(source, tmp_path / "int8", verify=True, **rotation)
    assert quantconvert.verify(tmp_path / "int8", source).is_ok
    quantconvert.dequantize(tmp_path / "int8", tmp_path / "plain", dtype="float32")
    found, expected = logits(case, tmp_path / "plain"), logits(case, source)
    assert 1e-5 < relative(found, expected) < 0.05
    # what is rotated is not what a wrong rotation would be: without the head's, the model is another
    tensors = read_tensors(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(1).contiguous()
    assert relative(logits(case, write_checkpoint(tmp_path / "wrong", tensors, config)), expected) > 0.5


def test_transformers_loads_rotated_int8(tmp_path: Path):
    """As it is: a tied Llama of which the head has become a tensor, activations quantized too."""
    case = CASES["llama tied"]
    source = save_float32(case, tmp_path / "source")
    errors = {}
    for name, options in {"plain": {}, "rotated": {"rotate": "r1,r2"}}.items():
        given: Any = {"scheme": "W8A8", **options}
        quantconvert.convert(source, tmp_path / name, **given)
        errors[name] = relative(logits(case, tmp_path / name), logits(case, source))
    assert 1e-5 < errors["rotated"] < 0.05
    assert 1e-5 < errors["plain"] < 0.05
