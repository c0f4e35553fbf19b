"""Number types, `Quantized` with every kind of offset and scale, registries, digests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from quantconvert.digest import canonical, digest
from quantconvert.errors import UsageError
from quantconvert.number import CODE_TYPES, E2M1, E2M1_VALUES, E4M3, INT4, UINT4, UINT8, code_type
from quantconvert.quantized import Quantized, dequantize
from quantconvert.registry import Registry
from quantconvert.schemes import Scheme


def test_integers():
    table = {name: (t.low, t.high, t.midpoint, t.levels, t.top) for name, t in CODE_TYPES.items() if t.kind == "int"}
    assert table == {
        "int4": (-8, 7, 8, 16, 15), "uint4": (0, 15, 8, 16, 15),
        "int8": (-128, 127, 128, 256, 255), "uint8": (0, 255, 128, 256, 255),
    }  # fmt: skip
    assert INT4.spacing(-3) == 1.0


def test_floats_are_those_of_torch():
    """Highest value and spacing of e4m3 against torch's own type; e2m1 against the table of its sixteen patterns."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = sorted(set(codes[~codes.isnan()].tolist()))
    assert (E4M3.low, E4M3.high) == (values[0], values[-1])
    for low, high in pairwise(values):
        assert E4M3.spacing(low if low >= 0 else high) == high - low
    four = sorted(set(E2M1_VALUES))
    assert (E2M1.low, E2M1.high) == (four[0], four[-1])
    for low, high in pairwise(four):
        assert E2M1.spacing(low if low >= 0 else high) == high - low


def test_schemes_name_a_number():
    assert Scheme(4, True, "channel").number is INT4
    assert Scheme(8, False, "channel").number is UINT8
    assert code_type("float", 8, True) is E4M3
    with pytest.raises(KeyError):
        code_type("int", 3, True)


def block(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)


def test_a_bias_is_added():
    codes, scale, bias = block(3, 8), torch.rand(3, 2) + 1, torch.randn(3, 2)
    expected = codes.float() * scale.repeat_interleave(4, 1) + bias.repeat_interleave(4, 1)
    assert torch.equal(dequantize(Quantized(codes, scale, bias, UINT4)), expected)


def test_a_zero_point_is_subtracted_and_the_midpoint_stands_for_none():
    codes, scale, zero = block(3, 8), torch.rand(3, 2) + 1, block(3, 2, seed=1)
    expected = (codes.float() - zero.float().repeat_interleave(4, 1)) * scale.repeat_interleave(4, 1)
    assert torch.equal(dequantize(Quantized(codes, scale, zero, UINT4)), expected)
    expected = (codes.float() - 8) * scale.repeat_interleave(4, 1)
    assert torch.equal(dequantize(Quantized(codes, scale, None, INT4)), expected)
    assert torch.equal(dequantize(Quantized(codes, scale[:1, :1], None, INT4)), (codes.float() - 8) * scale[0, 0])


def test_blocks_may_be_partial_and_groups_out_of_order():
    codes, scale = block(5, 7), torch.rand(3, 2) + 1
    rows, columns = torch.arange(5) // 2, torch.arange(7) // 4
    expected = (codes.float() - 8) * scale[rows][:, columns]
    assert torch.equal(dequantize(Quantized(codes, scale, None, INT4, block=(2, 4))), expected)
    order = torch.tensor([1, 0, 0, 1, 1, 0, 1])
    expected = (codes.float() - 8) * torch.rand(5, 2).fill_(2)[:, order]
    assert torch.equal(dequantize(Quantized(codes, torch.full((5, 2), 2.0), None, INT4, order=order)), expected)


def test_floats_are_their_own_values():
    codes = torch.tensor([[1.5, -448.0], [0.0, 2.0]]).to(torch.float8_e4m3fn)
    assert torch.equal(dequantize(Quantized(codes, torch.full((2, 1), 0.5), None, E4M3)), codes.float() * 0.5)
    nibbles = torch.arange(16, dtype=torch.uint8).view(1, 16)
    assert dequantize(Quantized(nibbles, torch.ones(1, 1), None, E2M1))[0].tolist() == list(E2M1_VALUES)


@dataclass(frozen=True)
class Named:
    name: str


def test_registries_tell_what_there_is():
    registry = Registry("thing", Named("a"), Named("b"), also=("auto",))
    with registry.added(Named("c"), first=True):
        assert list(registry) == ["c", "a", "b"]
        with pytest.raises(ValueError, match="thing c is registered already"):
            registry.register(Named("c"))
    assert list(registry) == ["a", "b"]
    with pytest.raises(UsageError, match="unknown thing `c`") as caught:
        registry.find("c")
    assert caught.value.hint == "known things: auto, a, b"


def test_every_field_counts_in_a_digest():
    @dataclass(frozen=True)
    class Inner:
        number: int
        words: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        by_name: dict[str, Any]

    base = Outer(Inner(1), {"b": 1, "a": None})
    assert digest(base) == digest(Outer(Inner(1), {"a": None, "b": 1}))
    for other in (
        dataclasses.replace(base, inner=Inner(2)),
        dataclasses.replace(base, inner=Inner(1, ("x",))),
        dataclasses.replace(base, by_name={"b": 1, "a": 0}),
    ):
        assert digest(other) != digest(base)
    with pytest.raises(TypeError, match="object cannot be hashed by its content"):
        canonical(object())
