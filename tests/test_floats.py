"""float8: what is planned, what is kept, what verification finds; the same bytes however it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantconvert.api import convert, plan, verify
from quantconvert.errors import QuantConvertError, UnsupportedError
from tests.builders import llama_tensors, read_tensors, write_checkpoint
from tests.snapshots import digests

SCHEMES = ("FP8_DYNAMIC", "FP8_DYNAMIC:tensor", "FP8_BLOCK", "FP8A16", "FP8A16:block")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_tensors(dtype=torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_bytes(scheme: str, source: Path, tmp_path: Path):
    options: dict[str, Any] = {"scheme": scheme, "format": "compressed-tensors"}
    convert(source, tmp_path / "one", workers=1, **options)
    convert(source, tmp_path / "three", workers=3, memory_limit="20MB", **options)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    verified = verify(tmp_path / "one", source=source)
    assert verified.is_ok, verified.findings


def blocked(folder: Path) -> dict[str, int]:
    """How many weights are kept for their blocks, by their last name."""
    found: dict[str, int] = {}
    for task in plan(folder, scheme="FP8_BLOCK").tasks:
        if task.reason == "unaligned":
            name = task.source.module.rpartition(".")[2]
            found[name] = found.get(name, 0) + 1
    return found


def test_merged_projections_must_be_whole_blocks(tmp_path: Path):
    """All but the last of those that engines load as one; o and down stand alone."""
    config: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}
    tensors = {}
    for name, rows, columns in (
        ("self_attn.q_proj", 256, 256), ("self_attn.k_proj", 128, 256), ("self_attn.v_proj", 128, 256),
        ("self_attn.o_proj", 256, 256), ("mlp.gate_proj", 320, 256), ("mlp.up_proj", 320, 256),
        ("mlp.down_proj", 256, 320),
    ):  # fmt: skip
        tensors[f"model.layers.0.{name}.weight"] = torch.randn(rows, columns).bfloat16()
    tensors["model.embed_tokens.weight"] = torch.randn(64, 256).bfloat16()
    for name in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"):
        tensors[f"model.{name}.weight"] = torch.ones(256).bfloat16()
    known = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 64}
    config |= known | {"intermediate_size": 320, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "source", tensors, config)
    assert blocked(source) == {"gate_proj": 1, "up_proj": 1}
    notes = " ".join(plan(source, scheme="FP8_BLOCK").notes)
    assert "`model.layers.0.mlp.gate_proj` are kept: [320, 256], loaded with others as gate_up_proj" in notes
    with pytest.raises(QuantConvertError) as info:  # 320 / 2 columns of down, 128 / 2 rows of k and v
        plan(source, scheme="FP8_BLOCK", tensor_parallel=2)
    assert "in_features % 128 == 0, got 160: `model.layers.0.mlp.down_proj`" in str(info.value)
    assert "out_features % 128 == 0, got 64: `model.layers.0.self_attn.k_proj`" in str(info.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "FP8_DYNAMIC", "format": "awq"}, "awq holds no float8 per channel, float8 activations"),
        ({"scheme": "FP8_DYNAMIC", "format": "gptq"}, "gptq holds no float8 per channel, float8 activations"),
        ({"scheme": "W4A16", "format": "fp8"}, "fp8 holds no int4 g128 symmetric"),
        ({"scheme": "FP8_DYNAMIC", "format": "fp8"}, "fp8 holds FP8_BLOCK alone, no float8 per channel"),
        ({"scheme": "FP8A16", "method": "search"}, "no codes for float8 per channel (ranges of whole numbers"),
    ],
)
def test_refused(source: Path, options: dict[str, Any], said: str):
    with pytest.raises(UnsupportedError) as info:
        plan(source, **options)
    assert said in str(info.value)


@pytest.mark.parametrize("options", [{"scheme": "FP8_DYNAMIC"}, {"scheme": "FP8_BLOCK"}, {"format": "fp8"}], ids=str)
@pytest.mark.parametrize("what", ["bit", "scale", "nan"])
def test_verify_finds(options: dict[str, Any], what: str, source: Path, tmp_path: Path):
    """By the values, without the report and its sha256."""
    out = tmp_path / "out"
    convert(source, out, **options)
    (out / "quantconvert.json").unlink()
    tensors = read_tensors(out)
    name = "model.layers.1.mlp.down_proj.weight"
    scale = next(key for key in tensors if key.startswith(f"{name}_scale"))
    codes = tensors[name].view(torch.uint8)
    if what == "bit":
        codes[3, 5] ^= 0x08  # the exponent's lowest
    elif what == "scale":
        tensors[scale][0] *= 1.25
    else:
        codes[3, 5] = 0x7F
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = verify(out, source=source, method="rtn").findings
    assert [finding.where for finding in found] == [name.removesuffix(".weight")], found
    assert verify(out).is_ok == (what != "nan")
