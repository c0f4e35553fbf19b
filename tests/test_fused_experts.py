"""Experts that a checkpoint holds in one 3-D tensor: which axis is which, whose rows are whose.

All sizes differ, and gate and up differ in size by ten, so that no wrong axis, order or turn goes unnoticed. The
expected slices are those of transformers' forward passes: `modeling_gpt_oss.py` (`gate_up[..., ::2]` is the gate),
`modeling_llama4.py` (`chunk(2, dim=-1)` of `x @ gate_up_proj`), `modeling_granitemoe.py` (`chunk(2, dim=-1)` of
`linear(x, gate_up_proj)`), `modeling_qwen3_5_moe.py` (the same).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.errors import QuantConvertError
from tests.builders import decode_compressed_tensors, read_tensors, weight, write_checkpoint

E, H, I = 3, 64, 96  # noqa: E741
TEXT = {"hidden_size": H, "num_hidden_layers": 1, "tie_word_embeddings": False}
LOCAL = TEXT | {"num_local_experts": E, "intermediate_size": I}
ROUTED = TEXT | {"num_experts": E, "moe_intermediate_size": I, "intermediate_size": 7}


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its experts, and how `gate`, `up` and `down` [out, in] are cut from one expert's matrix."""

    config: dict[str, Any]
    gate_up: str
    down: str
    experts: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    gate: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    to_down: Callable[[Tensor], Tensor]


def plain(config: dict[str, Any], gate_up: str, down: str, experts: str) -> Layout:
    shapes = ((E, 2 * I, H), (E, H, I))
    return Layout(config, gate_up, down, experts, shapes, lambda m: m[:I], lambda m: m[I:], lambda m: m)


def transposed(config: dict[str, Any], stem: str) -> Layout:
    shapes = ((E, H, 2 * I), (E, I, H))
    names = (f"{stem}.gate_up_proj", f"{stem}.down_proj", stem)
    return Layout(config, *names, shapes, lambda m: m[:, :I].T, lambda m: m[:, I:].T, lambda m: m.T)


LAYER = "model.layers.0"
GRANITE = f"{LAYER}.block_sparse_moe"
TEXT_LAYER = "model.language_model.layers.0.mlp.experts"
LLAMA4 = "language_model.model.layers.0.feed_forward.experts"
LAYOUTS = {
    "granite": plain(
        LOCAL | {"model_type": "granitemoe"},
        f"{GRANITE}.input_linear.weight", f"{GRANITE}.output_linear.weight", f"{GRANITE}.experts",
    ),
    "qwen3_5_moe": plain(
        {"model_type": "qwen3_5_moe", "text_config": ROUTED | {"model_type": "qwen3_5_moe_text"}},
        f"{TEXT_LAYER}.gate_up_proj", f"{TEXT_LAYER}.down_proj", TEXT_LAYER,
    ),
    "qwen3_vl_moe": transposed(
        {"model_type": "qwen3_vl_moe", "text_config": ROUTED | {"model_type": "qwen3_vl_moe_text"}}, TEXT_LAYER,
    ),
    "qwen3_vl_moe, saved by transformers 5": plain(
        {"model_type": "qwen3_vl_moe", "text_config": LOCAL | {"moe_intermediate_size": I, "intermediate_size": 7}},
        f"{TEXT_LAYER}.gate_up_proj", f"{TEXT_LAYER}.down_proj", TEXT_LAYER,
    ),
    "llama4": transposed({"model_type": "llama4", "text_config": LOCAL | {"model_type": "llama4_text"}}, LLAMA4),
    "gpt_oss": Layout(
        LOCAL | {"model_type": "gpt_oss"},
        f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj", f"{LAYER}.mlp.experts",
        ((E, H, 2 * I), (E, I, H)),
        lambda m: m[:, 0::2].T, lambda m: m[:, 1::2].T, lambda m: m.T,
    ),
}  # fmt: skip
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def fused_tensors(layout: Layout) -> dict[str, Tensor]:
    """Gate ten times as large as up; and experts of different sizes, too."""
    gate_up, down = (weight(*shape, seed=i) for i, shape in enumerate(layout.shapes))
    for e in range(E):
        layout.gate(gate_up[e]).mul_(10)
        gate_up[e] *= 1 + e
    return {"model.embed_tokens.weight": weight(8, H), layout.gate_up: gate_up, layout.down: down}


def expected_parts(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for e in range(E):
        found[f"{layout.experts}.{e}.gate_proj"] = layout.gate(tensors[layout.gate_up][e])
        found[f"{layout.experts}.{e}.up_proj"] = layout.up(tensors[layout.gate_up][e])
        found[f"{layout.experts}.{e}.down_proj"] = layout.to_down(tensors[layout.down][e])
    return found


@every_layout
def test_each_expert_is_its_own_slice(layout: Layout, tmp_path: Path):
    tensors = fused_tensors(layout)
    source = write_checkpoint(tmp_path / "in", tensors, layout.config)
    quantconvert.convert(source, tmp_path / "out", format="compressed-tensors", group_size=32)
    found = read_tensors(tmp_path / "out")
    expected = expected_parts(layout, tensors)
    assert {name.removesuffix(".weight_packed") for name in found if name.endswith(".weight_packed")} == set(expected)
    assert not {layout.gate_up, layout.down} & set(found)
    for module, part in expected.items():
        assert tuple(part.shape) in ((I, H), (H, I))
        step = found[f"{module}.weight_scale"].float().repeat_interleave(32, 1)
        off = (decode_compressed_tensors(found, module, 4).float() - part.float()).abs() / step
        assert off.max() < 0.6, module


@every_layout
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_parts_of_a_fused_tensor_are_written_as_if_they_had_stood_alone(layout: Layout, format: str, tmp_path: Path):
    tensors = fused_tensors(layout)
    source = write_checkpoint(tmp_path / "fused", tensors, layout.config)
    parts = {f"{name}.weight": part.contiguous() for name, part in expected_parts(layout, tensors).items()}
    parts |= {name: tensor for name, tensor in tensors.items() if name not in (layout.gate_up, layout.down)}
    apart = write_checkpoint(tmp_path / "apart", parts, layout.config)
    for folder, out in ((source, "a"), (apart, "b")):
        quantconvert.convert(folder, tmp_path / out, format=format, group_size=32)
    found, expected = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_biases_of_gpt_oss_take_turns_as_the_rows_do(tmp_path: Path):
    layout = LAYOUTS["gpt_oss"]
    gate_up = torch.arange(E * 2 * I, dtype=torch.float32).view(E, 2 * I)
    down = -torch.arange(E * H, dtype=torch.float32).view(E, H)
    tensors = fused_tensors(layout) | {f"{layout.gate_up}_bias": gate_up, f"{layout.down}_bias": down}
    source = write_checkpoint(tmp_path / "in", tensors, layout.config)
    quantconvert.convert(source, tmp_path / "out", format="compressed-tensors", group_size=32)
    found = read_tensors(tmp_path / "out")
    for e in range(E):
        assert torch.equal(found[f"{layout.experts}.{e}.gate_proj.bias"], gate_up[e, 0::2])
        assert torch.equal(found[f"{layout.experts}.{e}.up_proj.bias"], gate_up[e, 1::2])
        assert torch.equal(found[f"{layout.experts}.{e}.down_proj.bias"], down[e])


@every_layout
def test_a_shape_that_the_config_does_not_say_is_refused(layout: Layout, tmp_path: Path):
    """Which side is longer never decides: a tensor the other way round is no tensor we know."""
    tensors = fused_tensors(layout)
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in (layout.gate_up, layout.down)}
    source = write_checkpoint(tmp_path / "in", tensors, layout.config)
    with pytest.raises(QuantConvertError, match=r"experts|linear"):
        quantconvert.plan(source, format="compressed-tensors", group_size=32)
