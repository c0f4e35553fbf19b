"""Golden checks against the compressed-tensors package: the same scales, zero points, codes, words and config.

Documented departures (`quantconvert/methods/rounding.py`), each with a test of its own here: an all-zero group has
scale 1 rather than the dtype's epsilon, and codes divide in float32, as compressed-tensors does on a GPU and, on a CPU,
for float32 weights only.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from quantconvert.api import convert, plan
from quantconvert.layouts.packing import pack_columns, pack_rows
from quantconvert.methods import rounding as rtn
from quantconvert.schemes import Scheme
from tests.builders import llama_tensors, weight, write_checkpoint
from tests.engines.common import TINY_LLAMA

ROWS, COLUMNS, GROUP = 64, 384, 128
SCHEMES = [
    Scheme(bits, symmetric, strategy, GROUP if strategy == "group" else None)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel", "tensor")
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def args_of(scheme: Scheme) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=scheme.num_bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
    )


def hostile(dtype: torch.dtype) -> Tensor:
    """Random rows, and rows that are one-sided, constant, tiny, or all in one outlier. No group is all zero."""
    w = weight(ROWS, COLUMNS, seed=11, dtype=torch.float32)
    w[1], w[2] = w[1].abs() + 0.01, -w[2].abs() - 0.01
    w[3], w[4] = 0.037, -0.037
    w[5] *= 1e-2
    w[6] *= 1e-4
    w[7, ::7] = 3.25
    w[8, ::11] = -0.5
    w[9:20] *= torch.logspace(-3, 1, 11).unsqueeze(1)
    return w.to(dtype)


def theirs(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale [O, G] and zero point of compressed-tensors; the range is measured in the weight's own dtype."""
    if scheme.strategy == "tensor":
        low, high = w.min().view(1, 1), w.max().view(1, 1)
    else:
        groups = w.view(len(w), -1, scheme.group_size or w.shape[1])
        low, high = groups.amin(-1), groups.amax(-1)
    return calculate_qparams(low, high, args_of(scheme))


@every_dtype
@every_scheme
def test_scales_and_zero_points_are_theirs(scheme: Scheme, dtype: torch.dtype):
    w = hostile(dtype)
    scale, zero_point = theirs(w, scheme)
    ours, our_zero_point = rtn.qparams(rtn.measure(w.float(), scheme), scheme, dtype, dtype)
    assert ours.dtype == scale.dtype == dtype
    assert torch.equal(ours, scale)
    if scheme.symmetric:
        assert our_zero_point is None
        assert not zero_point.any()
    else:
        assert our_zero_point is not None
        assert torch.equal(our_zero_point.to(torch.int8), zero_point)


@every_dtype
@every_scheme
def test_codes_and_words_are_theirs_in_float32_arithmetic(scheme: Scheme, dtype: torch.dtype):
    w = hostile(dtype)
    scale, zero_point = theirs(w, scheme)
    codes = quantize(w.float(), scale.float(), zero_point, args_of(scheme), dtype=torch.int8)
    ours = rtn.quantize(w.float(), scheme, dtype, dtype)
    assert torch.equal((ours.codes.int() - 2 ** (scheme.num_bits - 1)).to(torch.int8), codes)
    assert torch.equal(pack_columns(ours.codes, scheme.num_bits), pack_to_int32(codes, scheme.num_bits))
    if not scheme.symmetric:
        packed = pack_rows(ours.zero_points(), scheme.num_bits)
        assert torch.equal(packed, pack_to_int32(zero_point, scheme.num_bits, packed_dim=0))


@every_scheme
def test_codes_are_close_to_those_of_their_eager_path(scheme: Scheme):
    """On a CPU compressed-tensors rounds w / s, and w / s + zp, to bfloat16: some codes are a step off."""
    w = hostile(torch.bfloat16)
    scale, zero_point = theirs(w, scheme)
    args = args_of(scheme)
    codes = quantize(w, scale, zero_point, args, dtype=torch.int8).int()
    ours = rtn.quantize(w.float(), scheme, w.dtype, w.dtype).codes.int() - 2 ** (scheme.num_bits - 1)
    assert (ours - codes).abs().max() <= 1
    assert (ours != codes).float().mean() < (0.02 if scheme.num_bits == 4 else 0.3)
    errors = [(dequantize(q, scale.float(), zero_point, args) - w.float()).abs().mean() for q in (ours, codes)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 64), (13, 24), (1, 8), (5, 3), (33, 129)])
def test_words_of_any_width_are_theirs(shape: tuple[int, int], num_bits: int):
    top = 2**num_bits
    codes = torch.randint(0, top, shape, generator=torch.Generator().manual_seed(7))
    signed = (codes - top // 2).to(torch.int8)
    assert torch.equal(pack_columns(codes.to(torch.uint8), num_bits), pack_to_int32(signed, num_bits))
    assert torch.equal(pack_rows(codes.to(torch.uint8), num_bits), pack_to_int32(signed, num_bits, packed_dim=0))


@every_dtype
@every_scheme
def test_departure_a_group_of_zeros_has_scale_one_and_stays_zero(scheme: Scheme, dtype: torch.dtype):
    w = torch.zeros(8, COLUMNS, dtype=dtype)
    scale, _ = theirs(w, scheme)
    ours = rtn.quantize(w.float(), scheme, dtype, dtype)
    assert (scale == torch.finfo(dtype).eps).all()
    assert (ours.scale == 1).all()
    assert (ours.codes == ours.zero_points().max()).all()


CONFIGS = {
    "int4 g128": {},
    "int4 g128 asymmetric": {"symmetric": False},
    "int4 channel": {"group_size": -1},
    "int4 tensor": {"group_size": 0},
    "int8 g128": {"bits": 8},
    "int8 channel": {"bits": 8, "group_size": -1},
}


def validated(block: dict) -> QuantizationConfig:
    return QuantizationConfig.model_validate({key: value for key, value in block.items() if key != "quant_method"})


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_config_validates_and_says_what_was_asked(options: dict):
    made = plan(TINY_LLAMA, format="compressed-tensors", **options)
    config = validated(made.config["quantization_config"])
    assert config.quantization_status == "compressed"
    (group,) = config.config_groups.values()
    size = options.get("group_size", 128)
    strategy = {-1: "channel", 0: "tensor"}.get(size, "group")
    weights = group.weights
    assert (weights.num_bits, weights.symmetric) == (options.get("bits", 4), options.get("symmetric", True))
    assert (weights.strategy, weights.group_size) == (strategy, size if size > 0 else None)
    assert (weights.dynamic, group.input_activations, group.format) == (False, None, "pack-quantized")


def test_config_of_two_schemes_validates(tmp_path):
    write_checkpoint(tmp_path / "in", llama_tensors(hidden=192))
    made = convert(tmp_path / "in", tmp_path / "out", on_indivisible="channel").plan
    config = validated(made.config["quantization_config"])
    strategies = {group.weights.strategy for group in config.config_groups.values()}
    assert strategies == {"group", "channel"}
    assert config.format == "pack-quantized"
