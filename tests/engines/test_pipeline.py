"""The text encoder of a converted pipeline, loaded by transformers as a pipeline loads it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import quantconvert
from tests.builders import read_tensors
from tests.engines.common import load, write_reference
from tests.engines.decoding import decode_all


def test_a_text_encoder(tmp_path: Path):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64, eos_token_id=2,
    )  # fmt: skip
    model = CLIPTextModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    source = tmp_path / "in"
    model.bfloat16().save_pretrained(source / "text_encoder")
    (source / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "CLIPTextModel"]}))
    quantconvert.convert_pipeline(source, tmp_path / "out", group_size=32, format="compressed-tensors")
    out = tmp_path / "out" / "text_encoder"
    assert any(name.endswith("weight_packed") for name in read_tensors(out))
    decoded = decode_all(out, torch.float32)
    reference = load(write_reference(source / "text_encoder", out, tmp_path / "twin", decoded), "CLIPTextModel")
    ids = torch.arange(3, 15).view(1, 12)
    with torch.no_grad():
        found, expected, plain = (
            m(input_ids=ids).last_hidden_state for m in (load(out, "CLIPTextModel"), reference, model.float())
        )
    assert (found - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2
