"""float8: the scales and codes of compressed-tensors, and what transformers computes from the files.

Two departures (`quantconvert/methods/floats.py`): what is all zero has scale 1 rather than the dtype's epsilon, and
codes divide in float32, where compressed-tensors rounds the quotient to the weight's dtype first.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from quantconvert.api import convert, verify
from quantconvert.methods import floats
from quantconvert.schemes import BLOCK, Scheme
from tests.builders import read_tensors, weight
from tests.engines.common import TINY_LLAMA, heldout_windows, load, logits

SCHEMES = {
    "channel": Scheme(8, True, "channel", type="float"),
    "tensor": Scheme(8, True, "tensor", type="float"),
    "block": Scheme(8, True, "block", type="float", block=BLOCK),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def args_of(scheme: Scheme) -> QuantizationArgs:
    block = list(scheme.block) if scheme.block else None
    return QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=scheme.strategy, block_structure=block)


def hostile(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows; outliers, tiny and constant ones. Nothing is all zero."""
    w = weight(rows, columns, seed=5, dtype=torch.float32)
    w[1], w[3] = w[1].abs() + 0.01, 0.037
    w[5] *= 1e-4 if dtype != torch.float16 else 0.1  # of which float16 holds no scale
    w[7, ::7] = 325.0
    return w.to(dtype)


def theirs(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and codes of compressed-tensors."""
    if scheme.block:
        rows, columns = w.shape
        padded = torch.nn.functional.pad(w, (0, -columns % 128, 0, -rows % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, -1, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif scheme.strategy == "tensor":
        low, high = w.min().view(1, 1), w.max().view(1, 1)
    else:
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale, zero = calculate_qparams(low, high, args_of(scheme))
    return scale, quantize(w, scale, zero, args_of(scheme), dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(192, 320), (256, 256), (130, 129)], ids=str)
@every_scheme
def test_scales_and_codes_are_theirs(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype):
    """Scales always; codes where the quotient is not rounded in between, and all but some percent where it is."""
    w = hostile(*shape, dtype)
    scale, codes = theirs(w, scheme)
    span = floats.largest_of_all([w.float()], scheme)
    ours = floats.quantize(w.float().clone(), scheme, dtype, dtype, span)
    assert torch.equal(ours.scale, scale)
    differ = (ours.codes.view(torch.uint8) != codes.view(torch.uint8)).float().mean().item()
    print(f"{scheme.label}, {dtype}: {differ:.2%} of the codes differ")
    assert differ == 0 if dtype == torch.float32 else differ < 0.05
    rounded = floats.over(scale.float(), scheme, w.shape)
    again = (w.float() / rounded).to(dtype).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))  # that rounding is all there is
    off = (ours.codes.float() * rounded - w.float()).abs()
    assert bool((off <= (codes.float() * rounded - w.float()).abs() + 1e-6 * off.max()).all())  # ours is never farther
    read = dequantize(codes, scale, args=args_of(scheme)).float()
    assert torch.allclose(read, codes.float() * rounded, rtol=0.01, atol=1e-6)


@every_scheme
def test_zeros_are_zeros(scheme: Scheme):
    found = floats.quantize(
        torch.zeros(128, 128),
        scheme,
        torch.bfloat16,
        torch.bfloat16,
        floats.largest_of_all([torch.zeros(1, 1)], scheme),
    )
    assert not found.codes.float().any()
    assert found.scale.unique().tolist() == [1.0]


def by_hand(folder: Path) -> dict[str, Tensor]:
    """The quantized weights of a result, by a decoder of its own."""
    stored, found = read_tensors(folder), {}
    for name, codes in stored.items():
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        if scale is None:
            continue
        values = torch.empty(codes.shape)
        for r in range(codes.shape[0]):
            for c in range(0, codes.shape[1], 128):
                row, column = (r // 128, c // 128) if scale.dim() == 2 and scale.shape[0] != codes.shape[0] else (r, 0)
                factor = scale.flatten()[0] if scale.numel() == 1 else scale[row, column]
                values[r, c : c + 128] = codes[r, c : c + 128].float() * factor.float()
        found[name] = values
    return found


CASES: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "FP8A16": {"scheme": "FP8A16"},
    "fp8": {"format": "fp8"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("floats") / "out"
    convert(TINY_LLAMA, folder, **CASES[request.param])
    return request.param, folder


def test_transformers_computes_what_the_file_says(case: tuple[str, Path]):
    """Weights alone: equal logits. With rounded activations: as near as those, and not equal."""
    name, folder = case
    dtype = torch.bfloat16 if name == "fp8" else torch.float32  # to which fp8 is decoded, whatever is asked for
    model, reference = load(folder, dtype=dtype), load(TINY_LLAMA, dtype=dtype)
    state = reference.state_dict()
    for tensor, values in by_hand(folder).items():
        state[tensor].copy_(values)
    ids = heldout_windows()[:4]
    original, found, expected = logits(load(TINY_LLAMA), ids), logits(model, ids), logits(reference, ids)
    worst, lost = (found - expected).abs().max().item(), (expected - original).abs().max().item()
    print(f"{name}: logits differ by {worst:.3g} from the reference's, which differ by {lost:.3g} from the original's")
    assert 0.01 < lost < 2
    assert (worst < 1e-3) if name in ("FP8A16", "fp8") else (0.01 < worst < 3)
    with torch.no_grad():
        agree = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert agree > 0.95


def test_the_config_is_their_preset(case: tuple[str, Path]):
    import json

    name, folder = case
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    if name not in ("FP8_DYNAMIC", "FP8_BLOCK"):
        return
    preset = preset_name_to_scheme(name, ["Linear"])
    group = copy.deepcopy(block["config_groups"]["group_0"])
    for part, theirs_ in (("weights", preset.weights), ("input_activations", preset.input_activations)):
        assert theirs_ is not None
        values = theirs_.model_dump(mode="json")
        for key, value in group[part].items():
            assert value == values[key] or (key, part) == ("group_size", "weights"), key


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """Qwen3-MoE, of sizes that blocks fit."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 256, "mlp_only_layers": [],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("experts") / "source"
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{"scheme": "FP8_DYNAMIC"}, {"scheme": "FP8A16"}, {"format": "fp8"}], ids=str)
def test_experts_load(options: dict[str, Any], experts: Path, tmp_path: Path):
    """Every tensor finds its place, and the noise is float8's (6 %) and not that of random numbers."""
    convert(experts, tmp_path / "out", **options)
    dtype = torch.bfloat16
    ids = heldout_windows()[:2]
    found, original = logits(load(tmp_path / "out", dtype=dtype), ids), logits(load(experts, dtype=dtype), ids)
    relative = ((found - original).norm() / original.norm()).item()
    print(f"{options}: logits differ by {relative:.3f} of their norm")
    assert 0.01 < relative < 0.15


def test_experts_in_blocks_are_known_not_to_load(experts: Path, tmp_path: Path):
    convert(experts, tmp_path / "out", scheme="FP8_BLOCK")
    with pytest.raises(RuntimeError, match="during automatic conversion"):
        load(tmp_path / "out")
    assert verify(tmp_path / "out", source=experts).is_ok


def test_verify_judges_foreign_ones(tmp_path: Path):
    """What compressed-tensors itself makes of the example, under our config: no report, other roundings."""
    import json

    from safetensors.torch import save_file

    for name in ("FP8_DYNAMIC", "FP8_BLOCK"):
        folder = tmp_path / name
        convert(TINY_LLAMA, folder, scheme=name)
        stored, source = read_tensors(folder), read_tensors(TINY_LLAMA)
        for tensor in [key for key in stored if f"{key}_scale" in stored]:
            scheme = SCHEMES["block" if name == "FP8_BLOCK" else "channel"]
            stored[f"{tensor}_scale"], stored[tensor] = theirs(source[tensor], scheme)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "quantconvert.json").unlink()
        assert verify(folder, source=TINY_LLAMA).is_ok
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["format"] == "float-quantized"
