"""Corners where two features meet: kept views and other commands, ranks and packed words, presets and fused experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.builders import LLAMA_CONFIG, decode_gptq, llama_tensors, read_tensors, weight, write_checkpoint

GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 32}
E, H, I = 3, 64, 96  # noqa: E741


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
    tensors = {f"h.0.{name}.weight": weight(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {"wte.weight": weight(32, 64), "wpe.weight": weight(16, 64)}
    return write_checkpoint(tmp_path / "gpt2", tensors, GPT2)


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    stem = "model.language_model.layers.0"
    text = {"hidden_size": H, "num_hidden_layers": 1, "num_experts": E, "moe_intermediate_size": I}
    tensors = {
        f"{stem}.mlp.experts.gate_up_proj": weight(E, 2 * I, H),
        f"{stem}.mlp.experts.down_proj": weight(E, H, I),
        f"{stem}.self_attn.o_proj.weight": weight(H, H),
        "model.language_model.embed_tokens.weight": weight(8, H),
    }
    config = {"model_type": "qwen3_5_moe", "text_config": text | {"model_type": "qwen3_5_moe_text"}}
    return write_checkpoint(tmp_path / "fused", tensors, config)


def test_repack_copies_what_was_kept_transposed(gpt2: Path, tmp_path: Path):
    quantconvert.convert(gpt2, tmp_path / "a", ignore="*.mlp.c_fc", format="compressed-tensors", group_size=32)
    quantconvert.repack(tmp_path / "a", tmp_path / "b", "gptq", verify=True)
    assert torch.equal(read_tensors(tmp_path / "b")["h.0.mlp.c_fc.weight"], read_tensors(gpt2)["h.0.mlp.c_fc.weight"])


def test_what_the_family_stores_transposed_is_not_dequantized_the_wrong_way_round(gpt2: Path, tmp_path: Path):
    quantconvert.convert(gpt2, tmp_path / "a", group_size=32)
    with pytest.raises(quantconvert.UnsupportedError, match=r"stores \[in, out\]"):
        quantconvert.dequantize(tmp_path / "a", tmp_path / "b")


def test_dequantize_copies_experts_that_were_kept_fused(fused: Path, tmp_path: Path):
    quantconvert.convert(fused, tmp_path / "a", ignore="*.experts.*", format="compressed-tensors", group_size=32)
    quantconvert.dequantize(tmp_path / "a", tmp_path / "b", verify=True)
    before, after = read_tensors(fused), read_tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    for name in before:
        if ".experts." in name:
            assert torch.equal(before[name], after[name]), name


def test_presets_know_fused_experts(fused: Path):
    plan = quantconvert.plan(fused, preset="experts-4-rest-8", group_size=32)
    bits = {task.source.name.rpartition(".experts.")[0] != "": set[int]() for task in plan.quantized}
    for task in plan.quantized:
        assert task.scheme
        bits[".experts." in task.source.name].add(task.scheme.num_bits)
    assert bits == {True: {4}, False: {8}}


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors", "awq"])
def test_ranks_that_begin_inside_a_packed_word(tmp_path: Path, layout: str):
    """12 rows a rank: neither the zero points of 8 rows nor AWQ's words begin where the second rank does."""
    tensors = llama_tensors(layers=1, kv=24)
    config = LLAMA_CONFIG | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    quantconvert.convert(source, tmp_path / "q", format=layout, symmetric=False, group_size=32)
    options: dict[str, Any] = {"format": "rtn", "bits": 8, "group_size": 32, "symmetric": True}
    name = "model.layers.0.self_attn.k_proj.weight"
    quantconvert.dequantize(tmp_path / "q", tmp_path / "plain", "float32")
    expected = read_tensors(tmp_path / "plain")[name]
    for rank in range(2):
        parts = dict(quantconvert.iter_quantized(tmp_path / "q", tp_rank=rank, tp_size=2, **options))
        scale = parts[f"{name}_scale"].float().repeat_interleave(32, 1)
        found = parts[name].float() * scale
        assert ((found - expected[12 * rank : 12 * (rank + 1)]).abs() / scale).max() < 1


def test_kept_decoded_weights_of_many_rows_come_whole(tmp_path: Path):
    big = torch.randn(2500, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(2500, 1) + 0.5
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = llama_tensors(layers=1) | {name: big, f"{name}_scale": scale}
    block = {"quant_method": "fbgemm_fp8"}
    config = LLAMA_CONFIG | {"num_hidden_layers": 1, "dtype": "float32", "quantization_config": block}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    rule = "model.layers.0.mlp.*=W8A16"
    found = quantconvert.iter_quantized(source, ignore="*.o_proj", rules=rule, group_size=32, format="rtn")
    assert torch.equal(dict(found)[name], big.float() * scale)


@pytest.mark.parametrize("order", [1, -1])
def test_of_tied_tensors_the_embedding_stays(tmp_path: Path, order: int):
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "tie_word_embeddings"}
    source = write_checkpoint(tmp_path / "in", config=config)
    tensors: dict[str, Tensor] = read_tensors(source)
    (source / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(dict(list(tensors.items())[::order]), source / "pytorch_model.bin")
    plan = quantconvert.plan(source)
    assert [one.ref.name for one in plan.dropped] == ["lm_head.weight"]


def test_verify_is_not_content_with_scales_that_fit_anything(tmp_path: Path):
    """All codes zero and all scales one: each value is within half a step of its code."""
    from safetensors.torch import load_file, save_file

    source = write_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    quantconvert.convert(source, out, format="compressed-tensors")
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if name.endswith("weight_packed"):
            tensors[name].fill_(-0x77777778)  # eight times the code 8, which is zero
        if name.endswith("weight_scale"):
            tensors[name].fill_(1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "quantconvert.json").unlink()
    found = quantconvert.verify(out, source, method="rtn")
    assert len(found.findings) == 14
    assert "times what the values of its group ask for" in found.findings[0].message


def test_a_linked_state_folder_is_refused(tmp_path: Path):
    source, out, elsewhere = write_checkpoint(tmp_path / "in"), tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (out / ".quantconvert").symlink_to(elsewhere)
    with pytest.raises(quantconvert.OutputError, match="is a link"):
        quantconvert.convert(source, out)
    assert (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "moves", [[["inside", "../outside"]], [[".quantconvert/x", "/etc/hostname"]], [[1]], 7, {"a": 1}], ids=str
)
def test_moves_of_somebody_else_are_not_made(tmp_path: Path, moves: Any):
    source, out = write_checkpoint(tmp_path / "in"), tmp_path / "out"
    (out / ".quantconvert").mkdir(parents=True)
    (tmp_path / "outside").write_text("mine")
    (out / ".quantconvert" / ".moves.json").write_text(json.dumps(moves))
    hosts = Path("/etc/hostname").exists()
    quantconvert.convert(source, out)
    assert (tmp_path / "outside").read_text() == "mine"
    assert Path("/etc/hostname").exists() == hosts
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "quantconvert.json",
        "quantconvert.svg",
    }


def test_decoder_of_the_builders_agrees(tmp_path: Path):
    """The reference of the ranks' test: what dequantize writes is what the independent decoder reads."""
    source = write_checkpoint(tmp_path / "in")
    quantconvert.convert(source, tmp_path / "q", format="gptq", symmetric=False, group_size=32)
    quantconvert.dequantize(tmp_path / "q", tmp_path / "plain", "float32")
    module = "model.layers.0.self_attn.k_proj"
    expected = decode_gptq(read_tensors(tmp_path / "q"), module, 4, v1=False).float()
    assert (read_tensors(tmp_path / "plain")[f"{module}.weight"] - expected).abs().max() < 1e-4
