"""W8A8 with stored scales of inputs: transformers with compressed-tensors computes what the files and the formula say.

The reference is a dense float32 model with the independently decoded weights, whose layers get inputs rounded by hand:
    x' = clamp(rint(x / s), -128, 127) * s,   s = max |x| / 127.5 in bfloat16, as stored
Both multiply in float32: logits may differ by the order of sums only (measured: 0). Loss in nats per byte over the
original's, measured: +0.0028 with statistics of 2,048 tokens of text, +0.0013 per tensor with 128 tokens that the model
wrote itself; W8A8 with scales per token +0.0004.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams

import quantconvert
from quantconvert.statistics import open_statistics
from tests.builders import read_tensors
from tests.engines.common import EXAMPLES, TINY_LLAMA, heldout_loss, heldout_windows, load, logits, write_reference
from tests.engines.decoding import decode_all, quantization_config

LOGIT_TOLERANCE = 1e-4
ORIGINAL_LOSS, LOSS_BOUND = 1.1391, 0.012


@dataclass
class Case:
    statistics: Path
    folder: Path
    model: Any


@pytest.fixture(scope="module", params=["W8A8_STATIC", "W8A8_STATIC:tensor"])
def case(request, tmp_path_factory) -> Case:
    """One with statistics of text (the end of the held-out text, whose beginning is judged), one of the model's own."""
    work = tmp_path_factory.mktemp("static")
    path = work / "s.safetensors"
    if request.param == "W8A8_STATIC":
        (work / "text.txt").write_bytes((EXAMPLES / "heldout.txt").read_bytes()[-20_000:])
        quantconvert.observe(TINY_LLAMA, path, tokens=2048, text=str(work / "text.txt"))
    else:
        quantconvert.observe(TINY_LLAMA, path, tokens=128, self_written=True)
    quantconvert.convert(TINY_LLAMA, work / "out", scheme=request.param, statistics=str(path))
    return Case(path, work / "out", load(work / "out"))


def rounding(scale: Tensor) -> Any:
    """A hook that rounds what a layer reads."""
    step = scale.float()
    return lambda _, inputs: (torch.clamp(torch.round(inputs[0] / step), -128, 127) * step,)


def test_logits_are_the_reference(case: Case, tmp_path: Path):
    folder = case.folder
    decoded = decode_all(folder, torch.float32)
    tensors = read_tensors(folder)
    scales = {name.removesuffix(".input_scale"): t for name, t in tensors.items() if name.endswith(".input_scale")}
    assert scales.keys() == decoded.keys()
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith(".input_scale")}
    reference = load(write_reference(TINY_LLAMA, strip(folder, without, tmp_path), tmp_path / "reference", decoded))
    ids = heldout_windows()[:4]
    weights_only = logits(reference, ids)
    for module, scale in scales.items():
        reference.get_submodule(module).register_forward_pre_hook(rounding(scale))
    found, expected = logits(case.model, ids), logits(reference, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert (found - weights_only).abs().max() > 100 * LOGIT_TOLERANCE  # so all this could have failed


def strip(folder: Path, tensors: dict[str, Tensor], work: Path) -> Path:
    """The folder without scales of inputs, which a dense reference has no place for."""
    from tests.builders import write_checkpoint

    return write_checkpoint(work / "stripped", tensors, json.loads((folder / "config.json").read_text()))


def test_scales_are_those_of_compressed_tensors(case: Case):
    """Its own `calculate_qparams` on the maxima that were observed."""
    block = quantization_config(case.folder)
    config = QuantizationConfig.model_validate({key: value for key, value in block.items() if key != "quant_method"})
    (group,) = config.config_groups.values()
    assert isinstance(group.input_activations, QuantizationArgs)
    assert (group.input_activations.dynamic, group.input_activations.strategy) == (False, "tensor")
    found = open_statistics(case.statistics)
    scales = {n: t for n, t in read_tensors(case.folder).items() if n.endswith(".input_scale")}
    assert len(scales) == 28
    for name, scale in scales.items():
        ref = found.max(name.removesuffix(".input_scale"))
        assert ref is not None
        largest = torch.tensor(list(found.values(ref)))
        expected, _ = calculate_qparams(-largest, largest, group.input_activations)
        assert torch.equal(scale, expected.to(torch.bfloat16)), name


def test_heldout_loss(case: Case):
    loss = heldout_loss(case.model)
    print(f"loss {loss:.4f}, {loss - ORIGINAL_LOSS:+.4f}")
    assert loss < ORIGINAL_LOSS + LOSS_BOUND
