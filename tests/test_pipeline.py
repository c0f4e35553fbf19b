"""Pipelines: text encoders are converted, all else is carried over, nothing appears before it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.command import cli
from tests.snapshots import digests

CLIP = {
    "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "vocab_size": 96,
}  # fmt: skip


def clip_tensors() -> dict[str, Any]:
    stem = "text_model.encoder.layers"
    found = {
        f"{stem}.{i}.self_attn.{name}.weight": weight(64, 64, seed=i)
        for i in range(2)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    for i in range(2):
        found |= {f"{stem}.{i}.mlp.fc1.weight": weight(128, 64), f"{stem}.{i}.mlp.fc2.weight": weight(64, 128)}
        found |= {f"{stem}.{i}.layer_norm{k}.weight": torch.ones(64).bfloat16() for k in (1, 2)}
    return found | {
        "text_model.embeddings.token_embedding.weight": weight(96, 64),
        "text_model.embeddings.position_embedding.weight": weight(77, 64),
        "text_model.final_layer_norm.weight": torch.ones(64).bfloat16(),
    }


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Two text encoders, a diffusion model, a VAE, a tokenizer and a scheduler."""
    folder = tmp_path / "in"
    write_checkpoint(folder / "text_encoder", clip_tensors(), CLIP)
    write_checkpoint(folder / "text_encoder_2", llama_tensors(), LLAMA_CONFIG)
    for name, config in (("transformer", "FluxTransformer2DModel"), ("vae", "AutoencoderKL")):
        write_checkpoint(folder / name, {"x.weight": weight(8, 8)}, {"_class_name": config})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.35.0",
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "LlamaForCausalLM"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "safety_checker": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_text_encoders_are_converted_and_the_rest_is_carried_over(pipeline: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = quantconvert.convert_pipeline(pipeline, out, group_size=32, verify=True)
    assert set(result.components) == {"text_encoder", "text_encoder_2"}
    before, after = digests(pipeline), digests(out)
    others = {name: value for name, value in before.items() if not name.startswith("text_encoder")}
    assert {name: after[name] for name in others} == others
    assert set(result.carried) == set(others)
    assert set(after) - set(others) == {name for name in after if name.startswith("text_encoder")}
    for name in result.components:
        assert quantconvert.verify(out / name, pipeline / name).is_ok
        quantconvert.convert(pipeline / name, tmp_path / name, group_size=32)
        assert digests(tmp_path / name) == digests(out / name)
    packed = read_tensors(out / "text_encoder")
    assert "text_model.encoder.layers.0.self_attn.q_proj.qweight" in packed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_done_is_kept(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    whole = quantconvert.convert_pipeline(pipeline, tmp_path / "whole", group_size=32)
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if self.name == ".out.quantconvert":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(quantconvert.OutputError, match="cannot rename"):
            quantconvert.convert_pipeline(pipeline, out, group_size=32)
    assert not out.exists()
    with pytest.raises(quantconvert.OutputError, match="interrupted conversion of another kind"):
        quantconvert.convert_pipeline(pipeline, out, group_size=64)
    again = quantconvert.convert_pipeline(pipeline, out, group_size=32)
    assert set(again.components.values()) == {None}
    assert digests(out) == digests(tmp_path / "whole")
    assert None not in whole.components.values()


def test_every_refusal_at_once(pipeline: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(quantconvert.OutputError, match="exists and is not empty"):
        quantconvert.convert_pipeline(pipeline, tmp_path / "out", group_size=32)
    with pytest.raises(quantconvert.Refusal) as caught:
        quantconvert.convert_pipeline(pipeline, tmp_path / "new", group_size=24)
    assert {note for error in caught.value.errors for note in getattr(error, "__notes__", ())} == {
        "component text_encoder", "component text_encoder_2",
    }  # fmt: skip
    assert not (tmp_path / "new").exists()
    (pipeline / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(quantconvert.UnsupportedError, match="a pipeline without a component that can be converted"):
        quantconvert.convert_pipeline(pipeline, tmp_path / "new")


def test_a_pipeline_is_no_checkpoint(pipeline: Path, tmp_path: Path):
    assert quantconvert.is_pipeline(pipeline)
    assert not quantconvert.is_pipeline(pipeline, subfolder="text_encoder")
    with pytest.raises(quantconvert.CheckpointError, match="is a pipeline, no checkpoint"):
        quantconvert.plan(pipeline)
    plan = quantconvert.plan(pipeline, subfolder="text_encoder", group_size=32)
    assert (plan.family, len(plan.quantized)) == ("clip-text", 12)


@pytest.mark.process
def test_the_command_line(pipeline: Path, tmp_path: Path):
    done = cli(pipeline, tmp_path / "out", "--group-size", "32", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["components"]) == {"text_encoder", "text_encoder_2"}
    assert "carried over" in done.stderr
    assert (tmp_path / "out" / "model_index.json").is_file()
    again = cli(pipeline, tmp_path / "out", "--group-size", "32")
    assert again.returncode == 5
    assert "Traceback" not in again.stderr


def test_components_by_name(pipeline: Path, tmp_path: Path):
    """A diffusion model is converted where it is asked for, by the names of its layers."""
    blocks = {
        f"transformer_blocks.0.attn.{name}.weight": weight(64, 64) for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    tensors = blocks | {"x_embedder.weight": weight(64, 64)}
    write_checkpoint(pipeline / "transformer", tensors, {"_class_name": "FluxTransformer2DModel"})
    result = quantconvert.convert_pipeline(
        pipeline, tmp_path / "out", group_size=32, format="compressed-tensors", components=["transformer"], verify=True
    )
    assert set(result.components) == {"transformer"}
    stored = read_tensors(tmp_path / "out" / "transformer")
    packed = {name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")}
    assert packed == set(blocks)
    before, after = digests(pipeline / "text_encoder"), digests(tmp_path / "out" / "text_encoder")
    assert before == after
    with pytest.raises(quantconvert.UsageError, match="no folder `tokenizer`") as caught:
        quantconvert.convert_pipeline(pipeline, tmp_path / "b", components=["tokenizer"])
    assert "text_encoder, text_encoder_2, transformer, vae" in str(caught.value.hint)
