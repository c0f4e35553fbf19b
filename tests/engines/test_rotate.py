"""A rotated model computes what the source does, in transformers, to float32's error; and so after quantization."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantconvert.families import FAMILIES
from tests.builders import read_tensors
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
