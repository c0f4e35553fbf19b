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

SCHEMES = (
    "FP8_DYNAMIC", "FP8_DYNAMIC:tensor", "FP8_BLOCK", "FP8A16", "FP8A16:block", "NVFP4A16", "MXFP4A16", "MXFP8",
)  # fmt: skip


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
        ({"scheme": "NVFP4A16", "format": "awq"}, "awq holds no float4 g16, e4m3 scales"),
        ({"scheme": "FP8A16", "method": "search"}, "no codes for float8 per channel (ranges of whole numbers"),
    ],
)
def test_refused(source: Path, options: dict[str, Any], said: str):
    with pytest.raises(UnsupportedError) as info:
        plan(source, **options)
    assert said in str(info.value)


def spoil(tensors: dict[str, torch.Tensor], module: str, what: str) -> None:
    """Something that no reader would notice."""
    name = next(key for key in tensors if key in (f"{module}.weight", f"{module}.weight_packed"))
    scale = next(tensors[key] for key in tensors if key in (f"{module}.weight_scale", f"{module}.weight_scale_inv"))
    codes = tensors[name].view(torch.uint8)
    match what:
        case "bit":
            codes[3, 5] ^= 0x04 if name.endswith("packed") else 0x08  # of an exponent
        case "nan":
            codes[3, 5] = 0x7F
        case "scale":
            scale.copy_((scale.float() * 1.25).to(scale.dtype))
        case "power":
            scale[2, 1] += 1
        case "divisor":
            tensors[f"{module}.weight_global_scale"] *= 1.25
        case "order":
            codes.copy_(codes >> 4 | codes << 4)


def test_siblings_share_a_divisor(source: Path, tmp_path: Path):
    """Found over all that engines load as one, wherever it lies; four over six leaves room for a larger scale."""
    import math

    tensors = llama_tensors(dtype=torch.bfloat16)
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    up[3, 3] = 9.0
    split = write_checkpoint(tmp_path / "split", tensors, shards=3)
    for method, top in (("rtn", 448), ("four-over-six", 256)):
        convert(split, tmp_path / method, scheme="NVFP4A16", method=method)
        stored = read_tensors(tmp_path / method)
        gate, also = (stored[f"model.layers.0.mlp.{n}_proj.weight_global_scale"].item() for n in ("gate", "up"))
        assert gate == also
        wanted = top * 6 / 9
        wanted = wanted if method == "rtn" else 2 ** math.floor(math.log2(wanted))
        assert math.isclose(gate, wanted, rel_tol=0.004)
        other = stored["model.layers.0.mlp.down_proj.weight_global_scale"].item()
        assert other > 10 * gate
    assert plan(source, scheme="NVFP4A16").job.method == "four-over-six"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        *(({"scheme": scheme}, what) for scheme in ("FP8_DYNAMIC", "FP8_BLOCK") for what in ("bit", "scale", "nan")),
        *(({"format": "fp8"}, what) for what in ("bit", "scale", "nan")),
        *(({"scheme": "NVFP4A16"}, what) for what in ("bit", "scale", "divisor", "order")),
        *(({"scheme": "MXFP4A16"}, what) for what in ("bit", "power", "order")),
        *(({"scheme": "MXFP8"}, what) for what in ("bit", "power", "nan")),
    ],
)
def test_verify_finds(options: dict[str, Any], what: str, source: Path, tmp_path: Path):
    """By the values, without the report and its sha256."""
    out = tmp_path / "out"
    convert(source, out, **options)
    (out / "quantconvert.json").unlink()
    tensors = read_tensors(out)
    module = "model.layers.1.mlp.down_proj"
    spoil(tensors, module, what)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = verify(out, source=source, method="rtn").findings
    assert [finding.where for finding in found] == [module], found
    assert verify(out).is_ok == (what != "nan")
