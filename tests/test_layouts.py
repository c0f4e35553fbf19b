"""The contract of every registered format: it writes what it promises, and an independent decoder reads it back."""

from __future__ import annotations

import pytest
import torch

from quantconvert.buffers import torch_dtype
from quantconvert.layouts import LAYOUTS, Layout, Stored
from quantconvert.layouts.packing import pack_columns, pack_rows, pack_rows_int4
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme
from tests.builders import decode

SCHEMES = [
    Scheme(bits, symmetric, strategy, 32 if strategy == "group" else None)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel", "tensor")
] + [Scheme(8, True, "channel", None, True), Scheme(8, True, "tensor", None, True)]
SHAPES = [(8, 32), (64, 96), (128, 32), (1, 32), (13, 64), (40, 160)]


def random_quantized(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> Quantized:
    top = 2**scheme.num_bits
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    groups = (1, 1) if scheme.strategy == "tensor" else (shape[0], scheme.num_groups(shape[1]))
    codes = torch.randint(0, top, shape, generator=generator).to(torch.uint8)
    scale = (torch.rand(groups, generator=generator) + 0.1).to(dtype)
    zero_point = torch.randint(0, top, groups, generator=generator).to(torch.uint8)
    return Quantized(codes, scale, None if scheme.symmetric else zero_point, scheme.number)


def cases() -> list[tuple[Layout, Scheme, tuple[int, int]]]:
    every = ((f, s, shape) for f in LAYOUTS.values() for s in SCHEMES for shape in SHAPES)
    return [(f, s, shape) for f, s, shape in every if not f.problems(s, shape, "M")]


@pytest.mark.parametrize(
    ("fmt", "scheme", "shape"), cases(), ids=lambda v: getattr(v, "name", None) or getattr(v, "label", None) or str(v)
)
def test_encode_keeps_the_promise_and_decodes(fmt: Layout, scheme: Scheme, shape: tuple[int, int]):
    dtype = torch_dtype(fmt.scale_dtype("BF16"))
    q = random_quantized(shape, scheme, dtype)
    blocks = fmt.encode(q, scheme, shape)
    stored = {}
    for spec in fmt.outputs(shape, "BF16", scheme):
        block = blocks.pop(spec.suffix)
        block = block.t().contiguous() if spec.transposed else block
        assert tuple(block.shape) == spec.shape
        assert block.dtype == torch_dtype(spec.dtype)
        assert block.numel() * block.element_size() == spec.nbytes
        stored[f"M.{spec.suffix}"] = block
    assert not blocks, "encode made a tensor that outputs does not promise"
    zero_point = q.zero_points().int()
    width = shape[1] // q.scale.shape[1]
    expected = (q.codes.int() - zero_point.repeat_interleave(width, 1)).to(dtype) * q.scale.repeat_interleave(width, 1)
    found = decode(stored, "M", fmt.name, scheme.num_bits, scheme.symmetric)
    if fmt.slack(scheme, fmt.scale_dtype("BF16")):
        # half a bit of the bias and one of what is expected, in bfloat16
        assert ((found - expected).abs() <= 2**-7 * 16 * q.scale.float().repeat_interleave(width, 1)).all()
    else:
        assert torch.equal(found.to(dtype), expected)
    offset = 1 if fmt.name == "gptq" and scheme.symmetric else 0
    back = fmt.decode(fmt.encode(q, scheme, shape), Stored("M", scheme, shape, {}, offset), shape[0])
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert (back.offset is None) == (q.offset is None)
    if q.offset is not None:
        assert torch.equal(back.zero_points(), q.offset)


def test_golden_words_of_compressed_tensors():
    """Vectors printed by compressed-tensors 0.20 `pack_to_int32` (signed values plus 2^(b-1))."""

    def packed(values: list[int], bits: int) -> list[int]:
        codes = torch.tensor([values]).add(2 ** (bits - 1)).to(torch.uint8)
        return pack_columns(codes, bits)[0].tolist()

    assert packed(list(range(-8, 8)), 4) == [1985229328, -19088744]
    assert packed([-128, -1, 0, 127, 1], 8) == [0xFF807F00 - 2**32, 0x81]
    assert packed([1, 2, 3], 4) == [0xBA9]


def test_golden_words_of_awq():
    """Eight output columns 0..7 make 0x75316420 (GPTQModel 7.7 `awq/utils/packing_utils.py`)."""
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    assert pack_rows_int4(codes, (0, 2, 4, 6, 1, 3, 5, 7)).tolist() == [[0x75316420]]
    assert pack_rows_int4(torch.full((8, 1), 8, dtype=torch.uint8), range(8)).tolist() == [[0x88888888 - 2**32]]


def test_pack_rows_is_the_transpose_of_pack_columns():
    codes = torch.randint(0, 16, (24, 10)).to(torch.uint8)
    assert torch.equal(pack_rows(codes, 4), pack_columns(codes.t().contiguous(), 4).t())
