"""Scales of either sign: the value of the largest magnitude is the code -8, all lose less, and verify knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.methods import METHODS, Inputs, Method
from quantconvert.schemes import Scheme
from tests.better_codes import check_layouts, check_noise, problem, run, scaled
from tests.builders import decode, read_tensors, write_checkpoint

FULL, PLAIN = METHODS["full-range"], METHODS["rtn"]
SCHEME = Scheme(4, True, "group", 32)


def test_the_largest_value_is_the_lowest_code():
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    w[0, :32] = 0
    q = run(FULL, w.clone(), SCHEME, Inputs())
    groups, codes = w.view(8, 4, 32), q.codes.view(8, 4, 32).int() - 8
    groups, codes = w.view(8, 4, 32), q.codes.view(8, 4, 32).int() - 8
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    value = torch.where(high > -low, high, low)
    assert (codes[(groups == value) & (value != 0)] == -8).all()
    expected = (value.squeeze(-1).float() / -8).bfloat16().float()
    assert torch.equal(q.scale.float()[expected != 0], expected[expected != 0])
    assert (q.scale.float() < 0).any()
    assert float(q.scale[0, 0]) == 1
    assert (codes[0, 0] == 0).all()


def test_it_loses_less_than_plain_rounding():
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))

    def lost(method: Method) -> float:
        q = run(method, w.clone(), SCHEME, Inputs())
        values = (q.codes.float() - 8) * q.scale.float().repeat_interleave(32, 1)
        return float((values - w).square().sum())

    assert lost(FULL) < 0.93 * lost(PLAIN)


@pytest.mark.parametrize("scheme", [SCHEME, Scheme(4, True, "channel")], ids=lambda s: s.label)
def test_layouts_noise_and_verification(scheme: Scheme):
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    assert check_layouts(FULL, w, scheme, Inputs()) >= 4
    check_noise(FULL, w, scheme, Inputs())
    q = run(FULL, w.clone(), scheme, Inputs())
    assert problem(FULL, w, q, scheme, "BF16") is None
    for factor in (0.25, 0.5, 2.0, -1.0):
        assert problem(FULL, w, scaled(q, factor), scheme, "BF16"), factor


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors", "gptq", "rtn", "mlx"])
def test_a_conversion_verifies_and_repacks(layout: str, tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    options: dict[str, Any] = {"method": "full-range", "symmetric": True, "group_size": 32}
    made = quantconvert.convert(source, tmp_path / "out", format=layout, verify=True, **options)
    assert quantconvert.verify(tmp_path / "out", source).is_ok
    quantconvert.repack(tmp_path / "out", tmp_path / "again", "compressed-tensors")
    for task in made.plan.quantized:
        module = task.source.name.removesuffix(".weight")
        first = decode(read_tensors(tmp_path / "out"), module, layout, 4, True).float()
        again = decode(read_tensors(tmp_path / "again"), module, "compressed-tensors", 4, True).float()
        assert torch.allclose(first, again, rtol=2**-7), module  # products in bfloat16, but for MLX


def test_refusals(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(quantconvert.UnsupportedError, match=r"it is for symmetric weights: --symmetric"):
        quantconvert.plan(source, method="full-range", group_size=32)
    with pytest.raises(quantconvert.UnsupportedError, match="kernels for rounded activations"):
        quantconvert.plan(source, method="full-range", scheme="W4A8:g32")
    with pytest.raises(quantconvert.UnsupportedError, match="scales of either sign, which in rtn is not known to be"):
        quantconvert.plan(
            source, method="full-range", symmetric=True, group_size=32, format="rtn", engines=["vllm", "transformers"]
        )
