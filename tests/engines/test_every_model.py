"""Each model type of transformers, tiny: what is quantized is linear, and what is linear and stays has a reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.engines.decoding import decode_all
from tests.engines.every_model import NOTHING, UNBUILT, differences, weights
from tests.engines.tiny_models import build, model_classes

CLASSES = model_classes()


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name not in UNBUILT and name not in NOTHING])
def test_decisions_are_what_the_classes_say(model_type: str, tmp_path: Path):
    found = list(weights(model_type, tmp_path))
    assert not list(differences(found))
    assert any(weight.reason is None for weight in found)


@pytest.mark.parametrize("model_type", NOTHING)
def test_what_has_no_linear_layer_is_refused(model_type: str, tmp_path: Path):
    with pytest.raises(quantconvert.UnsupportedError, match="has no weight to quantize"):
        list(weights(model_type, tmp_path))


@pytest.mark.parametrize("model_type", UNBUILT)
def test_what_transformers_does_not_build_here(model_type: str):
    with pytest.raises(Exception, match=UNBUILT[model_type]):
        build(model_type, CLASSES[model_type])


def experts_of(model: Any) -> Iterator[tuple[int, int, str, Tensor]]:
    """Each expert's matrix as the model multiplies by it: its layer, number and projection."""
    for name, parameter in model.named_parameters():
        found = re.search(
            r"layers\.(\d+)\..*\.(gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)$", name
        )
        if parameter.dim() != 3 or not found or re.search(r"shared_experts|self_attention", name):
            continue
        for number, matrix in enumerate(parameter.data):
            matrix = matrix.t() if "AriaExperts" in repr(type(model.get_submodule(name.rpartition(".")[0]))) else matrix
            if found[2] in ("gate_up_proj", "input_linear.weight"):
                gate, up = matrix.chunk(2)
                yield int(found[1]), number, "gate_proj", gate
                yield int(found[1]), number, "up_proj", up
            else:
                yield int(found[1]), number, "down_proj", matrix


FUSED = (
    "aria", "aria_text", "gemma4_text", "granitemoe_swa", "hy_v4", "inkling2", "inkling2_text", "inkling_mm_model",
    "inkling_text", "jetmoe", "minimax_m3_vl_text", "mistral4", "muse_spark", "step3p7", "zaya",
    "granitemoe",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_experts_are_taken_apart_as_the_model_does(model_type: str, tmp_path: Path):
    """int8 a row lies within half a step of what the model multiplies by, and nothing but the right matrix does."""
    model = build(model_type, CLASSES[model_type])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "in")
    quantconvert.convert(tmp_path / "in", tmp_path / "out", scheme="W8A16:channel", format="compressed-tensors")
    decoded = {}
    for name, weight in decode_all(tmp_path / "out").items():
        found = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)$", name)
        if found:
            decoded[int(found[1]), int(found[2]), found[3]] = weight.float()
    expected = {key[:3]: key[3] for key in experts_of(model)}
    assert expected
    assert decoded.keys() == expected.keys()
    for key, matrix in expected.items():
        steps = matrix.abs().amax(1, keepdim=True) / 127
        assert ((decoded[key] - matrix).abs() / steps).max() < 0.8, key
