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
from tests.engines.moe_families import LATENT

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
EYE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
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
# Layers that transformers calls otherwise than the Hub, and a Q-Former, which it keeps in float32.
RENAMED = {
    "phimoe": Case("PhimoeForCausalLM", GROUPED | {"num_local_experts": 4}, (), {}),
    "blip-2": Case(
        "Blip2ForConditionalGeneration",
        {
            "text_config": SIZES | {"model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64},
            "vision_config": EYE | {"image_size": 28, "patch_size": 14},
            "qformer_config": EYE | {"encoder_hidden_size": 64},
        }, (), {},
    ),
    "kimi_k25": Case(
        "Kimi_K25ForConditionalGeneration",
        {"text_config": LATENT | {"model_type": "deepseek_v3"}, "vision_config": EYE | {"intermediate_size": 96}},
        (), {},
    ),
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


@pytest.mark.parametrize("name", RENAMED)
def test_names_that_transformers_gives_are_in_the_ignore_list_too(name: str, tmp_path):
    """Of text alone, where it answers: every tensor must find its place."""
    case = RENAMED[name]
    folder = convert(save(case, tmp_path / "in"), tmp_path / "out", format="compressed-tensors")
    load(folder, case.model)
