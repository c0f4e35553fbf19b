"""Tensor parallelism: the plan's check per rank, and `iter_quantized`, whose ranks together are the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.families.parallel import Part, is_merged, part_of
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint

CONFIG = LLAMA_CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention with fused q/k/v, an MLP and two experts; every width divides by four ranks of group 32."""
    tensors = llama_tensors(hidden=256, intermediate=512, layers=1, kv=64)
    for e in range(2):
        stem = f"model.layers.0.mlp.experts.{e}"
        tensors |= {
            f"{stem}.gate_proj.weight": weight(128, 256, seed=90 + e),
            f"{stem}.up_proj.weight": weight(128, 256, seed=92 + e),
            f"{stem}.down_proj.weight": weight(256, 128, seed=94 + e),
        }
    config = CONFIG | {"model_type": "qwen3_moe", "num_hidden_layers": 1}
    return write_checkpoint(tmp_path_factory.mktemp("tp") / "model", tensors, config, shards=2)


ROW = ("o_proj", "down_proj")


def joined(name: str, parts: list[Tensor], whole: Tensor) -> Tensor:
    """The ranks' tensors side by side along the axis that sharding cut, rtn's [O, I] orientation."""
    module = name.rpartition(".")[0]
    if module.endswith(ROW):
        return torch.cat(parts, dim=1)
    if module.endswith(("k_proj", "v_proj")):  # two key/value heads: more ranks hold copies
        parts = parts[:: max(1, len(parts) // 2)]
    return torch.cat(parts)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["W4A16:g32", "W4A16_ASYM:g32", "W8A16:g32"])
def test_ranks_together_are_the_whole(source: Path, tmp_path: Path, size: int, scheme: str):
    options: dict[str, Any] = {"scheme": scheme, "format": "rtn"}
    result = quantconvert.convert(source, tmp_path / "out", **options)
    whole = read_tensors(tmp_path / "out")
    ranks = [dict(quantconvert.iter_quantized(source, tp_rank=r, tp_size=size, **options)) for r in range(size)]
    quantized = {task.source.name.removesuffix(".weight") for task in result.plan.quantized}
    assert all(set(rank) == set(whole) for rank in ranks)
    for name, tensor in whole.items():
        parts = [rank[name] for rank in ranks]
        if name.rpartition(".")[0] in quantized:
            assert torch.equal(joined(name, parts, tensor), tensor), name
            if size > 1:
                assert parts[0].numel() < tensor.numel()
        else:
            assert all(torch.equal(part, tensor) for part in parts)


def test_channel_scales_belong_to_the_rank(source: Path):
    """A row-parallel layer per channel: each rank has a scale of its own columns, as if its share were the weight."""
    name = "model.layers.0.mlp.down_proj"
    w = read_tensors(source)[f"{name}.weight"]
    for rank in range(2):
        found = dict(quantconvert.iter_quantized(source, tp_rank=rank, tp_size=2, scheme="W8A16:channel", format="rtn"))
        share = w[:, rank * 256 : (rank + 1) * 256].float()
        expected = (share.abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
        assert torch.equal(found[f"{name}.weight_scale"], expected)
        assert found[f"{name}.weight"].shape == (256, 256)


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_packed_layouts_have_the_rank_s_shapes(source: Path, layout: str):
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "format": layout}
    whole = dict(quantconvert.iter_quantized(source, **options))
    half = dict(quantconvert.iter_quantized(source, tp_rank=1, tp_size=2, **options))
    assert set(whole) == set(half)
    name = "model.layers.0.mlp.down_proj"
    suffix = "weight_packed" if layout == "compressed-tensors" else "qweight"
    assert half[f"{name}.{suffix}"].numel() * 2 == whole[f"{name}.{suffix}"].numel()


def test_group_size_is_checked_per_rank(source: Path):
    with pytest.raises(quantconvert.UnsupportedError) as caught:
        quantconvert.plan(source, bits=4, group_size=128, tensor_parallel=4, format="compressed-tensors")
    assert "does not divide in_features of 3 weights on each of 4 ranks" in caught.value.message
    assert "`model.layers.0.self_attn.o_proj.weight`: in_features 64" in caught.value.message
    assert "`model.layers.N.mlp.experts.N.down_proj.weight`: in_features 32 (2 of them" in caught.value.message
    assert "--group-size 32 divides every layer" in str(caught.value.hint)
    quantconvert.plan(source, bits=4, group_size=32, tensor_parallel=4, format="compressed-tensors")


def test_ranks_that_do_not_divide_the_model(source: Path):
    with pytest.raises(quantconvert.Refusal, match="--tensor-parallel 3 does not divide num_attention_heads 8"):
        quantconvert.plan(source, tensor_parallel=3)
    with pytest.raises(
        quantconvert.UsageError, match="--tensor-parallel: expected a whole number of at least 1, got 0"
    ):
        quantconvert.plan(source, tensor_parallel=0)
    with pytest.raises(quantconvert.UsageError, match="tp_rank: expected 0 to 1, got 2"):
        quantconvert.iter_quantized(source, tp_rank=2, tp_size=2)


def test_words_are_not_split_between_ranks(tmp_path: Path):
    """72 output features pack into AWQ words, but a rank's 18 do not; compressed-tensors has no such words."""
    tensors = llama_tensors(layers=1) | {
        f"model.layers.0.mlp.{name}_proj.weight": weight(72, 128, seed=i) for i, name in enumerate(("gate", "up"))
    }
    del tensors["model.layers.0.mlp.down_proj.weight"]  # 18 columns a rank are no group
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 72}
    config = LLAMA_CONFIG | sizes
    source = write_checkpoint(tmp_path / "model", tensors, config)
    with pytest.raises(quantconvert.UnsupportedError, match="on each of 4 ranks: awq packs 8 output features"):
        quantconvert.plan(source, group_size=32, tensor_parallel=4, format="awq")
    quantconvert.plan(source, group_size=32, tensor_parallel=4, format="compressed-tensors")
    with pytest.raises(quantconvert.UnsupportedError, match="8 zero points share a word"):
        quantconvert.plan(source, group_size=32, tensor_parallel=4, format="compressed-tensors", symmetric=False)


def test_merged_projections_are_refused(tmp_path: Path):
    tensors = {"model.layers.0.self_attn.qkv_proj.weight": weight(384, 128)}
    tensors |= {"model.embed_tokens.weight": weight(8, 128)}
    source = write_checkpoint(tmp_path / "phi", tensors, {"model_type": "phi3", "num_attention_heads": 4})
    quantconvert.plan(source)
    with pytest.raises(quantconvert.UnsupportedError, match=r"several projections in one weight, such as .*qkv_proj"):
        quantconvert.plan(source, tensor_parallel=2)


ROW_PARALLEL = [
    "model.layers.0.self_attn.dense", "model.layers.0.mlp.fc2", "transformer.h.0.mlp.fc_out",
    "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h", "transformer.h.0.attn.c_proj",
    "encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense", "encoder.layer.0.attention.attn.o",
    "transformer.layer.0.ffn.lin2", "transformer.layer.0.attention.out_lin", "model.layers.0.attn.Wo",
    "model.layers.0.mlp.Wo", "encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
    "encoder.albert_layer_groups.0.albert_layers.0.attention.dense", "decoder.block.0.layer.1.EncDecAttention.o",
    "encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo",
    "model.encoder.layers.0.self_attn.out_proj", "backbone.layers.0.mixer.out_proj",
    "model.layers.0.shared_mlp.output_linear", "model.layers.0.linear_attn.out_proj",
    "model.layers.0.block_sparse_moe.experts.0.w2", "model.layers.0.feed_forward.shared_expert.down_proj",
]  # fmt: skip
COLUMN_PARALLEL = [
    "model.layers.0.mlp.fc1", "transformer.h.0.mlp.fc_in", "transformer.h.0.mlp.dense_h_to_4h",
    "transformer.h.0.mlp.c_fc", "encoder.layer.0.intermediate.dense", "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.attn.q", "transformer.layer.0.ffn.lin1", "decoder.block.0.layer.1.EncDecAttention.q",
    "encoder.albert_layer_groups.0.albert_layers.0.ffn", "encoder.block.0.layer.1.DenseReluDense.wi_1",
]  # fmt: skip
MERGED = [
    "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj", "transformer.h.0.attn.c_attn",
    "transformer.h.0.self_attention.query_key_value", "model.layers.0.attn.Wqkv", "model.layers.0.mlp.Wi",
    "backbone.layers.0.mixer.in_proj", "model.layers.0.shared_mlp.input_linear",
    "model.layers.0.linear_attn.in_proj_qkv",
]  # fmt: skip


def test_every_family_splits_the_second_layer_of_a_pair_by_columns():
    for module in ROW_PARALLEL:
        assert part_of(module, (8, 16), 1, 2, {}) == Part((0, 8), (8, 16)), module
    for module in COLUMN_PARALLEL:
        assert part_of(module, (8, 16), 1, 2, {}) == Part((4, 8), (0, 16)), module
    assert {m for m in ROW_PARALLEL + COLUMN_PARALLEL + MERGED if is_merged(m)} == set(MERGED)
