"""float8: the scales and codes of compressed-tensors, and what transformers computes from the files.

Two departures (`quantconvert/methods/floats.py`): what is all zero has scale 1 rather than the dtype's epsilon, and
codes divide in float32, where compressed-tensors rounds the quotient to the weight's dtype first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from quantconvert.api import convert, verify
from quantconvert.layouts.floats import float_encode
from quantconvert.methods import floats
from quantconvert.schemes import BLOCK, Scheme, parse_scheme
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


# Of which inputs are rounded too.
LABELS = {name: parse_scheme(name, 128).settled(True).label for name in ("FP8_DYNAMIC", "FP8_BLOCK")}
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def by_hand(folder: Path) -> dict[str, Tensor]:
    """The quantized weights of a result, by a decoder of its own, in float32."""
    stored, found = read_tensors(folder), {}
    for name, scale in stored.items():
        if not name.endswith(("_scale", "_scale_inv")) or name.endswith("global_scale"):
            continue
        module = name.rpartition(".")[0]
        codes = stored.get(f"{module}.weight")
        if codes is None:
            packed = stored[f"{module}.weight_packed"].int()
            nibbles = torch.stack((packed % 16, packed // 16), -1).flatten(1)
            codes = torch.tensor(LEVELS)[nibbles % 8] * torch.where(nibbles >= 8, -1.0, 1.0)
        rows, columns = codes.shape
        if scale.dtype == torch.uint8:
            scale = 2.0 ** (scale.double() - 127)
        factor = scale.double() / stored.get(f"{module}.weight_global_scale", torch.ones(1)).double()
        factor = factor.view(1, 1) if factor.dim() == 1 else factor
        height, width = -(-rows // factor.shape[0]), -(-columns // factor.shape[1])
        spread = factor.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        found[f"{module}.weight"] = (codes.double() * spread).float()
    return found


SCALED = {name: parse_scheme(name, 128).settled(True) for name in ("NVFP4A16", "MXFP4A16", "MXFP8A16")}


def theirs_packed(name: str, w: Tensor, beside: Tensor) -> dict[str, Tensor]:
    """What compressed-tensors makes of a weight; `beside`: one that shares its global scale."""
    preset = preset_name_to_scheme(name, ["Linear"])
    assert preset.weights is not None
    groups = w.view(w.shape[0], -1, preset.weights.group_size)
    low, high, divisor = groups.amin(2), groups.amax(2), None
    if name == "NVFP4A16":
        both = torch.cat((w.flatten(), beside.flatten()))
        divisor = generate_gparam(both.min(), both.max())
    scale, zero = calculate_qparams(low, high, preset.weights, global_scale=divisor)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    state |= {} if divisor is None else {"weight_global_scale": divisor}
    preset.format = {
        "NVFP4A16": "nvfp4-pack-quantized", "MXFP4A16": "mxfp4-pack-quantized", "MXFP8A16": "mxfp8-quantized",
    }[name]  # fmt: skip
    return BaseCompressor.load_from_registry(preset.format).compress(state, preset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_packed_bytes_are_theirs(name: str, dtype: torch.dtype):
    """All bytes of float4; of float8 those that two roundings of bfloat16 do not move."""
    scheme, w = SCALED[name], hostile(192, 320, dtype)
    w[9, :64] = 0
    beside = hostile(64, 320, dtype) * 3
    span = floats.largest_of_all([w.float(), beside.float()], scheme)
    ours = float_encode(floats.quantize(w.float().clone(), scheme, dtype, dtype, span), scheme)
    for suffix, expected in theirs_packed(name, w, beside).items():
        mine, other = ours.pop(suffix), expected
        if suffix == "weight_global_scale":
            assert torch.equal(mine, other)
            continue
        differ = mine.view(torch.uint8) != other.view(torch.uint8)
        if suffix == "weight_scale" and name.startswith("MX"):
            differ[9, :2] = False  # a group of zeros has any scale
        print(f"{name}, {dtype}, {suffix}: {differ.float().mean().item():.3%} differ")
        most = 0.05 if (suffix, dtype) == ("weight", torch.bfloat16) else 0.0
        assert differ.float().mean().item() <= most
    assert not ours


CASES: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "FP8A16": {"scheme": "FP8A16"},
    "fp8": {"format": "fp8"},
    "NVFP4A16": {"scheme": "NVFP4A16"},
    "NVFP4A16, rtn": {"scheme": "NVFP4A16", "method": "rtn"},
    "MXFP4A16": {"scheme": "MXFP4A16"},
    "MXFP8A16": {"scheme": "MXFP8A16"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("floats") / "out"
    convert(TINY_LLAMA, folder, **CASES[request.param])
    return request.param, folder


def test_transformers_computes_what_the_file_says(case: tuple[str, Path]):
    """Weights alone: equal logits. With rounded activations: as near as those, and not equal."""
    name, folder = case
    # to which these are decoded, whatever is asked for
    dtype = torch.bfloat16 if name.startswith(("fp8", "NV", "MX")) else torch.float32
    model, reference = load(folder, dtype=dtype), load(TINY_LLAMA, dtype=dtype)
    state = reference.state_dict()
    for tensor, values in by_hand(folder).items():
        state[tensor].copy_(values)
    ids = heldout_windows()[:4]
    original, found, expected = logits(load(TINY_LLAMA), ids), logits(model, ids), logits(reference, ids)
    worst, lost = (found - expected).abs().max().item(), (expected - original).abs().max().item()
    print(f"{name}: logits differ by {worst:.3g} from the reference's, which differ by {lost:.3g} from the original's")
    assert 0.01 < lost < 5
    assert (0.01 < worst < 3) if "activations" in LABELS.get(name, "") else (worst < 1e-3)
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean().item() > 0.95


def test_the_config_is_their_preset(case: tuple[str, Path]):
    import json

    name, folder = case
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    if name not in ("FP8_DYNAMIC", "FP8_BLOCK", *SCALED):
        return
    preset = preset_name_to_scheme(name, ["Linear"])
    group = block["config_groups"]["group_0"]
    for part, expected in (("weights", preset.weights), ("input_activations", preset.input_activations)):
        if expected is None:
            assert group[part] is None
            continue
        values = QuantizationArgs(**group[part]).model_dump(exclude={"zp_dtype", "observer"})
        assert values == expected.model_dump(exclude={"zp_dtype", "observer"}), part


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


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "MXFP8A16", "MXFP8"])
def test_experts_that_are_known_not_to_load(scheme: str, experts: Path, tmp_path: Path):
    convert(experts, tmp_path / "out", scheme=scheme)
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
