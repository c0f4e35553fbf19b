"""Layers that stay as they are, in families without a table: the config says so, by the names that engines use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from tests.engines.common import load
from tests.engines.families import Case, convert, outputs, save

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
# Linear layers under `conv`, under `embedding...`: kept by names that mean something else in other families.
CASES = {
    "lfm2": Case("Lfm2ForCausalLM", GROUPED | {"layer_types": ["conv", "full_attention"]}, (), {}),
    "lfm2_moe": Case(
        "Lfm2MoeForCausalLM",
        GROUPED | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 64, "num_dense_layers": 1}, (), {},
    ),
    "rembert": Case("RemBertForMaskedLM", SIZES | {"input_embedding_size": 32, "output_embedding_size": 32}, (), {}),
}  # fmt: skip


def assert_agrees(case: Case, source: Path, folder: Path) -> None:
    """Every tensor finds its place, and the answers are those of the source but for what int4 takes."""
    found, expected = outputs(case, load(folder, case.model)), outputs(case, load(source, case.model))
    for a, b in zip(found, expected, strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("name", CASES)
def test_linear_layers_with_names_of_others_are_in_the_ignore_list(name: str, tmp_path):
    source = save(CASES[name], tmp_path / "in")
    assert_agrees(CASES[name], source, convert(source, tmp_path / "out", format="compressed-tensors"))
