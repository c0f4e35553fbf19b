"""The search for ranges: against a plain loop over ratios in numpy, and what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import quantconvert
from quantconvert.methods import METHODS, BadInputs, Inputs, NonFinite, ScaleOverflow
from quantconvert.methods.search import SMALLEST_RATIO
from quantconvert.quantized import Quantized, dequantize
from quantconvert.schemes import Scheme
from tests.better_codes import (
    DTYPES,
    SCHEMES,
    ToldSearch,
    check_blocks,
    check_layouts,
    check_noise,
    hostile,
    importances,
    problem,
    run,
    scaled,
    swapped,
)  # fmt: skip
from tests.builders import weight, write_checkpoint
from tests.snapshots import digests

SEARCH, RTN = METHODS["search"], METHODS["rtn"]
Floats = NDArray[np.float64]


def stored(value: float | np.floating[Any], dtype: str) -> float:
    """A number rounded to a dtype, to nearest even."""
    if dtype == "F16":
        return float(np.float32(np.float16(np.float32(value))))
    if dtype == "BF16":
        bits = int(np.float32(value).view(np.uint32))
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return float(np.uint32(bits).view(np.float32))
    return float(np.float32(value))


def candidates(group: Floats, importance: Floats, scheme: Scheme, dtype: str) -> list[tuple[float, int, float]]:
    """(scale, zero point counted from 0, weighted error) for each ratio, in the order of the ratios."""
    top = 2**scheme.num_bits - 1
    half = (top + 1) // 2
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    found = []
    for k in range(12):
        ratio = np.float32(1 - 0.3 * k / 11)
        mn, mx = np.float32(low) * ratio, np.float32(high) * ratio
        zero = 0
        if scheme.symmetric:
            scale = stored(max(-mn, mx) / np.float32(top / 2), dtype)
        else:
            scale = stored(np.float32(stored(mx - mn, dtype)) / np.float32(top), dtype)
            zero = round(min(max(stored(-half - stored(mn / np.float32(scale), dtype), dtype), -half), half - 1))
        codes = np.clip(np.rint(group / scale + zero), -half, half - 1)
        error = (codes - zero) * scale - group
        found.append((scale, zero + half, float((importance * error**2).sum())))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_the_least_weighted_error_of_all_ratios_is_kept(scheme: Scheme, dtype: str):
    w, importance = weight(11, 96, seed=7, dtype=DTYPES[dtype]), importances(96)
    q = run(SEARCH, w, scheme, Inputs(importance))
    groups, width = q.scale.shape[1], 96 // q.scale.shape[1]
    num_clear = num_narrower = 0
    for row in range(11):
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            every = candidates(w[row, part].double().numpy(), importance[part].double().numpy(), scheme, dtype)
            mine = (float(q.scale[row, group]), int(q.zero_points()[row, group]))
            losses = {(s, z): loss for s, z, loss in reversed(every)}
            assert mine in losses
            least = min(losses.values())
            assert losses[mine] <= least * (1 + 1e-4)
            rest = [loss for params, loss in losses.items() if params != mine]
            num_clear += all(loss > least * (1 + 1e-3) for loss in rest)
            num_narrower += mine != every[0][:2]
    assert num_clear > 0.9 * 11 * groups
    assert num_narrower > (0.5 if scheme.num_bits == 4 else 0.05) * 11 * groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_never_worse_than_round_to_nearest(group_size: int | None, symmetric: bool, dtype: str):
    scheme = Scheme(4, symmetric, "group" if group_size else "channel", group_size)
    w, importance = weight(37, 384, seed=2, dtype=DTYPES[dtype]), importances(384)

    def loss(q: Quantized) -> torch.Tensor:
        return ((dequantize(q).double() - w.double()).square() * importance).view(37, q.scale.shape[1], -1).sum(-1)

    searched, plain = loss(run(SEARCH, w, scheme, Inputs(importance))), loss(run(RTN, w, scheme, Inputs()))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.85 * plain.sum()


def test_equal_losses_keep_the_whole_range():
    w = weight(8, 64, seed=1)
    for scheme in SCHEMES:
        q, plain = run(SEARCH, w, scheme, Inputs(torch.zeros(64))), run(RTN, w, scheme, Inputs())
        assert torch.equal(q.scale, plain.scale)
        assert torch.equal(q.codes, plain.codes)


def test_a_loud_column_without_importance_is_clipped():
    w, importance = weight(6, 32, seed=4, dtype=torch.float32, scale=0.02), torch.ones(32)
    w[:, 9], importance[9] = 0.4, 0.0
    scheme = Scheme(4, True, "group", 32)
    ratio = run(SEARCH, w, scheme, Inputs(importance)).scale / run(RTN, w, scheme, Inputs()).scale
    assert torch.allclose(ratio, torch.full_like(ratio, SMALLEST_RATIO))
    assert torch.allclose(run(SEARCH, w, scheme, Inputs(importance * 1e30)).scale, ratio * 0.4 / 7.5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_a_row_does_not_depend_on_its_block(scheme: Scheme):
    check_blocks(SEARCH, weight(21, 96, seed=3), scheme, Inputs(importances(96)))


def test_a_row_of_odd_width_does_not_depend_on_its_block():
    check_blocks(SEARCH, weight(5, 70_001, seed=3), Scheme(4, False, "channel"), Inputs(importances(70_001)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_hostile_groups(scheme: Scheme, dtype: str):
    for importance in (importances(64), torch.full((64,), 1e38), torch.full((64,), 1e-38)):
        for name, w in hostile(DTYPES[dtype]):
            q = run(SEARCH, w, scheme, Inputs(importance))
            assert (q.scale > 0).all(), name
            back = dequantize(q).double()
            assert (back[w == 0] == 0).all(), name
            assert problem(SEARCH, w, q, scheme, dtype) is None, name


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_what_cannot_be_quantized(scheme: Scheme):
    w, inputs = weight(8, 64), Inputs(importances(64))
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = w.clone()
        broken[5, 33] = bad
        with pytest.raises(NonFinite):
            run(SEARCH, broken, scheme, inputs)
    with pytest.raises(ScaleOverflow):
        run(SEARCH, torch.full((1, 64), 3e7), scheme, inputs, torch.float16)
    small = run(SEARCH, torch.full((1, 64), 1e-9), scheme, inputs, torch.float16)
    assert (small.scale == 2.0**-24).all()


@pytest.mark.parametrize("bad", [None, torch.tensor([1.0, -1.0]), torch.tensor([1.0, torch.nan]), torch.ones(2, 2)])
def test_what_cannot_be_importances(bad: torch.Tensor | None):
    with pytest.raises(BadInputs):
        SEARCH.span(iter(()), SCHEMES[0], Inputs(bad))


def test_importances_of_another_width():
    with pytest.raises(BadInputs, match="32 importances for 64 columns"):
        run(SEARCH, weight(2, 64), SCHEMES[0], Inputs(torch.ones(32)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_layouts_noise_and_verification(scheme: Scheme):
    w, inputs = weight(24, 64, seed=8), Inputs(importances(64))
    assert check_layouts(SEARCH, w, scheme, inputs) >= 2
    check_noise(SEARCH, w, scheme, inputs)
    q = run(SEARCH, w, scheme, inputs)
    assert problem(SEARCH, w, q, scheme, "BF16") is None
    assert "steps from its value" in (problem(SEARCH, w, swapped(q), scheme, "BF16") or "")
    for factor in (0.25, 0.5, 2.0, -1.0):
        assert problem(SEARCH, w, scaled(q, factor), scheme, "BF16"), factor


def test_a_plan_of_one_scale_a_tensor_is_refused(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(quantconvert.UnsupportedError, match="no codes for int8 per tensor symmetric"):
        quantconvert.plan(source, method="search", scheme="W8A8:tensor")


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors", "gptq", "rtn"])
def test_a_conversion_verifies(layout: str, tmp_path: Path):
    source, out = write_checkpoint(tmp_path / "in"), tmp_path / "out"
    with METHODS.added(ToldSearch()):
        quantconvert.convert(source, out, method="told-search", group_size=32, format=layout, verify=True)
        quantconvert.convert(
            source, tmp_path / "cut", method="told-search", group_size=32, format=layout, memory_limit="12MB", workers=1
        )
    assert digests(tmp_path / "cut") == digests(out)
