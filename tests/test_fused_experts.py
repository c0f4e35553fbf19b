"""Experts that a checkpoint holds in one 3-D tensor: which axis is which, whose rows are whose.

All sizes differ, and gate and up differ in size by ten, so that no wrong axis, order or turn goes unnoticed. The
expected slices are those of transformers' forward passes: `modeling_gpt_oss.py` (`gate_up[..., ::2]` is the gate),
`modeling_llama4.py` (`chunk(2, dim=-1)` of `x @ gate_up_proj`), `modeling_granitemoe.py` (`chunk(2, dim=-1)` of
`linear(x, gate_up_proj)`), `modeling_qwen3_5_moe.py` (the same).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.errors import QuantConvertError
from tests.builders import decode_compressed_tensors, read_tensors, write_checkpoint
from tests.fused import LAYOUTS, E, H, I, Layout, every_layout, fused_tensors


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
