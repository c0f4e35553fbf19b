"""W8A8 and mixed precision: what transformers with compressed-tensors computes is what the files and the paper say.

The reference is a dense float32 model with the independently decoded weights whose W8A8 layers get rounded inputs. For
a token's activations x the public formula (symmetric, dynamic, per token; int8 -128 .. 127) is
    s = max|x| / 127.5,   x' = clamp(rint(x / s), -128, 127) * s
Both then multiply in float32, so logits may differ by the order of sums only: `LOGIT_TOLERANCE` (measured: 0 in every
case), where logits reach about 20. What the tests could miss is measured: rounded activations alone move logits by
0.12 or more, quantization in all by 0.38 (W8A8) to 1.6. Loss in nats per byte over the original's, measured: W8A8
+0.0004, per tensor +0.0003, W8A8 attention in int4 +0.0022, first-last-8 +0.0009, down-8 +0.0024, W4A8 +0.0043.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.utils import is_match

from quantconvert.api import convert, plan, repack
from quantconvert.planning import Plan
from tests.builders import read_tensors
from tests.engines import moe
from tests.engines.common import TINY_LLAMA, heldout_loss, heldout_windows, load, logits, write_reference
from tests.engines.decoding import decode_all, quantization_config

LOGIT_TOLERANCE = 1e-4
ORIGINAL_LOSS = 1.1391
LOSS_BOUNDS = {"W8A8": 0.003, "W4A8": 0.012, "W4AFP8": 0.012, "W8A8 attention, int4 rest": 0.012}
ATTENTION = r"re:.*self_attn\.(q|k|v|o)_proj$"
CASES: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8"},
    "W8A8 per tensor": {"scheme": "W8A8:tensor"},
    "W8A8 attention, int4 rest": {"rules": [f"{ATTENTION}=W8A8"]},
    "W8A8, int4 channel down, o skipped": {
        "scheme": "W8A8", "rules": ["*.down_proj=W4A16:channel", "*.o_proj=skip"],
    },
    "W4A8": {"scheme": "W4A8"},
    "W4AFP8": {"scheme": "W4AFP8"},
    "W4A8 channel, W8A8 down, W4A16 o": {
        "scheme": "W4A8:channel", "rules": ["*.down_proj=W8A8", "*.o_proj=W4A16:g128"],
    },
    "first-last-8": {"preset": "first-last-8"},
    "down-8": {"preset": "down-8"},
}  # fmt: skip


@dataclass
class Case:
    name: str
    folder: Path
    plan: Plan
    model: Any
    reference: Any

    @property
    def rounded(self) -> list[str]:
        """The W8A8 modules, as the file's dtypes say it, and those that the case has asked for in W4A8."""
        tensors = read_tensors(self.folder)
        found = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.int8]
        packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
        weight_only = "o_proj" if "W4A16 o" in self.name else "none"
        return found + [name for name in packed if self.name.startswith("W4A") and not name.endswith(weight_only)]


def round_activations(x: Tensor, to_floats: bool) -> Tensor:
    if to_floats:
        scale = x.abs().amax(dim=-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    work = tmp_path_factory.mktemp("w8a8")
    plan = convert(TINY_LLAMA, work / "out", format="compressed-tensors", **CASES[request.param]).plan
    decoded = decode_all(work / "out", torch.float32)
    reference = load(write_reference(TINY_LLAMA, work / "out", work / "reference", decoded))
    made = Case(request.param, work / "out", plan, load(work / "out"), reference)
    for name in made.rounded:
        reference.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: (round_activations(inputs[0], "FP8" in made.name),)
        )
    return made


@pytest.fixture(scope="module")
def original() -> Any:
    return load(TINY_LLAMA)


def test_config_validates_and_names_each_module(case: Case):
    """compressed-tensors' own matching gives every module the scheme that was planned; keys are those of 0.17 too."""
    block = quantization_config(case.folder)
    config = QuantizationConfig.model_validate({key: value for key, value in block.items() if key != "quant_method"})
    planned = {task.source.name.removesuffix(".weight"): task.scheme for task in case.plan.tasks}
    for name, module in case.reference.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        groups = [g for g in config.config_groups.values() if is_match(name, module, g.targets, config.ignore)]
        scheme = planned[name]
        assert len(groups) == (scheme is not None), name
        if scheme is None:
            continue
        weights, inputs = groups[0].weights, groups[0].input_activations
        assert (weights.num_bits, weights.symmetric) == (scheme.num_bits, scheme.symmetric), name
        assert (weights.strategy, weights.group_size) == (scheme.strategy, scheme.group_size), name
        assert (inputs is not None) == scheme.activations == (name in case.rounded), name
        plain = scheme.activations and scheme.num_bits == 8
        assert groups[0].format == ("int-quantized" if plain else "pack-quantized"), name
        if inputs is not None:
            kind = "float" if "FP8" in case.name else "int"
            assert (inputs.num_bits, inputs.type, inputs.symmetric) == (8, kind, True)
            assert (inputs.strategy, inputs.dynamic) == ("token", True)
    formats = {group.format for group in config.config_groups.values()}
    assert config.format == (formats.pop() if len(formats) == 1 else "mixed-precision")


def test_weights_and_logits_are_the_reference(case: Case, original: Any):
    ids = heldout_windows()[:4]
    found, expected = logits(case.model, ids), logits(case.reference, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)
    state = case.model.state_dict()  # the first forward unpacked the weights
    for name, tensor in case.reference.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert (found - logits(original, ids)).abs().max() > 100 * LOGIT_TOLERANCE  # so all this could have failed


def test_activations_are_rounded_in_w8a8_layers_only(case: Case):
    """Layer by layer, on inputs [batch, tokens, features]: compressed-tensors 0.20 takes 2-D ones for one token."""
    assert bool(case.rounded) == ("A8" in case.name or "AFP8" in case.name)
    for name, dense in case.reference.named_modules():
        if not isinstance(dense, torch.nn.Linear):
            continue
        x = torch.randn(1, 3, dense.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            answer, exact = case.model.get_submodule(name)(x), x @ dense.weight.t()
            rounded = round_activations(x, "FP8" in case.name) @ dense.weight.t()
        expected = rounded if name in case.rounded else exact
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
        assert (rounded - exact).abs().max() > 1e-3, name


@pytest.mark.parametrize("case", LOSS_BOUNDS, indirect=True)
def test_heldout_loss(case: Case):
    assert heldout_loss(case.model) < ORIGINAL_LOSS + LOSS_BOUNDS[case.name]


def test_w8a8_experts_are_refused_by_transformers(tmp_path):
    """What the plan's note says: transformers does not load W8A8 experts (vLLM does, on a GPU)."""
    if "gptqmodel" in sys.modules:
        pytest.skip("GPTQModel replaces transformers' experts in its process: run this file by itself")
    source = moe.save(moe.qwen3_moe, tmp_path / "in")
    plan = convert(source, tmp_path / "out", scheme="W8A8", format="compressed-tensors").plan
    assert any("W8A8 experts do not load" in note for note in plan.notes)
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(tmp_path / "out")


@pytest.mark.parametrize("name", ["W4A8", "W4AFP8"])
def test_w4a8_is_the_preset_of_compressed_tensors(name: str):
    """Its own, but for the format: that is the checkpoint's, and the observer, which no reader needs."""
    block = plan(TINY_LLAMA, scheme=name).quantization_config
    assert block
    config = QuantizationConfig.model_validate({key: value for key, value in block.items() if key != "quant_method"})
    (group,) = config.config_groups.values()
    preset = preset_name_to_scheme(name, ["Linear"])
    assert group.targets == preset.targets
    for part in ("weights", "input_activations"):
        found, expected = (getattr(s, part).model_copy(update={"observer": None}) for s in (group, preset))
        assert found == expected, part
    assert (config.format, group.output_activations) == ("pack-quantized", preset.output_activations)


def test_w4a8_experts_load_as_those_of_w4a16(tmp_path):
    """transformers unpacks experts as it merges them: the same weights, and no rounding of what they read."""
    if "gptqmodel" in sys.modules:
        pytest.skip("GPTQModel replaces transformers' experts in its process: run this file by itself")
    source = moe.save(moe.qwen3_moe, tmp_path / "in")
    ids, states, found = torch.arange(24).view(1, 24), {}, {}
    for scheme in ("W4A16:g32", "W4A8:g32"):
        convert(source, tmp_path / scheme, scheme=scheme, format="compressed-tensors")
        model = load(tmp_path / scheme)
        found[scheme], states[scheme] = logits(model, ids), model.state_dict()
    assert any("experts" in name for name in states["W4A8:g32"])
    for name, tensor in states["W4A16:g32"].items():
        assert torch.equal(states["W4A8:g32"][name], tensor), name
    assert not torch.equal(found["W4A8:g32"], found["W4A16:g32"])  # attention's inputs are rounded


def test_gptq_repacked_loads_as_w8a8(tmp_path):
    """int8 per channel from GPTQ, its codes as they are: what transformers computes is the reference's."""
    convert(TINY_LLAMA, tmp_path / "gptq", scheme="W8A16:channel", format="gptq")
    repack(tmp_path / "gptq", tmp_path / "out", "compressed-tensors", activations="int8")
    decoded = decode_all(tmp_path / "out", torch.float32)
    reference = load(write_reference(TINY_LLAMA, tmp_path / "out", tmp_path / "reference", decoded))
    for name in decoded:
        reference.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: (round_activations(inputs[0], False),)
        )
    ids = heldout_windows()[:2]
    found = logits(load(tmp_path / "out"), ids)
    torch.testing.assert_close(found, logits(reference, ids), rtol=0, atol=LOGIT_TOLERANCE)
    assert heldout_loss(reference) < ORIGINAL_LOSS + LOSS_BOUNDS["W8A8"]
