"""Rounding with error feedback: against the textbook's loop with an explicit inverse in numpy, and what it promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import quantconvert
from quantconvert.methods import METHODS, BadInputs, Inputs, NonFinite, feedback
from quantconvert.methods.gptq import MAX_SHIFT
from quantconvert.quantized import Quantized, dequantize
from quantconvert.schemes import Scheme
from tests.better_codes import (
    DTYPES,
    SCHEMES,
    ToldGptq,
    check_blocks,
    check_layouts,
    check_noise,
    hostile,
    moments,
    problem,
    run,
    scaled,
    swapped,
)
from tests.builders import weight, write_checkpoint
from tests.snapshots import digests

GPTQ, RTN, SEARCH = METHODS["gptq"], METHODS["rtn"], METHODS["search"]


def textbook(w: torch.Tensor, q: Quantized, h: torch.Tensor) -> NDArray[np.int64]:
    """Codes of float64 [O, I] for the scales and zero points of `q`, one column at a time, H^-1 reduced by each."""
    values, moment = w.double().numpy().copy(), h.double().numpy().copy()
    moment[np.diag_indices_from(moment)] += 0.01 * np.diag(moment).mean()
    inverse = np.linalg.inv(moment)
    scale, zero = q.scale.double().numpy(), q.zero_points().double().numpy()
    width, top = values.shape[1] // scale.shape[1], q.number.top
    codes = np.zeros(values.shape, dtype=np.int64)
    for j in range(values.shape[1]):
        s, z = scale[:, j // width], zero[:, j // width]
        nearest = np.clip(np.rint(w[:, j].double().numpy() / s + z), 0, top)
        code = np.clip(np.rint(values[:, j] / s + z), nearest - MAX_SHIFT, nearest + MAX_SHIFT).clip(0, top)
        codes[:, j] = code.astype(np.int64)
        error = (values[:, j] - (code - z) * s) / inverse[j, j]
        values[:, j:] -= np.outer(error, inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def loss(w: torch.Tensor, q: Quantized, h: torch.Tensor) -> float:
    """The squared error of what the layer gives out."""
    off = dequantize(q).double() - w.double()
    return float(((off @ h.double()) * off).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_codes_are_the_textbook_s(scheme: Scheme, dtype: str):
    """Where float32 rounds a half the other way, the rest of a row differs: few rows may."""
    w, h = weight(24, 288, seed=6, dtype=DTYPES[dtype]), moments(288)
    q = run(GPTQ, w, scheme, Inputs(None, h))
    searched = run(SEARCH, w, scheme, Inputs(h.diagonal()))
    assert torch.equal(q.scale, searched.scale)
    assert torch.equal(q.zero_points(), searched.zero_points())
    same = (torch.from_numpy(textbook(w, q, h)) == q.codes).all(1)
    assert same.sum() >= 22


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_far_better_than_round_to_nearest_where_inputs_go_together(group_size: int | None, symmetric: bool, dtype: str):
    scheme = Scheme(4, symmetric, "group" if group_size else "channel", group_size)
    w, h = weight(37, 384, seed=2, dtype=DTYPES[dtype]), moments(384)
    mine = loss(w, run(GPTQ, w, scheme, Inputs(None, h)), h)
    assert mine < 0.2 * loss(w, run(RTN, w, scheme, Inputs()), h)
    assert mine < 0.25 * loss(w, run(SEARCH, w, scheme, Inputs(h.diagonal())), h)


def test_inputs_that_have_nothing_in_common_leave_the_nearest_codes():
    w, h = weight(9, 160, seed=4), torch.diag(torch.rand(160) + 0.1)
    for scheme in SCHEMES:
        q, searched = run(GPTQ, w, scheme, Inputs(None, h)), run(SEARCH, w, scheme, Inputs(h.diagonal()))
        assert torch.equal(q.codes, searched.codes)


def test_columns_without_input_are_rounded_to_nearest():
    w, h, scheme = weight(9, 160, seed=4), moments(160), Scheme(4, False, "group", 32)
    dead = torch.arange(0, 160, 7)
    h[dead], h[:, dead] = 0, 0
    q = run(GPTQ, w, scheme, Inputs(None, h))
    nearest = run(SEARCH, w, scheme, Inputs(h.diagonal()))
    assert torch.equal(q.codes[:, dead], nearest.codes[:, dead])
    assert not torch.equal(q.codes, nearest.codes)
    nothing = run(GPTQ, w, scheme, Inputs(None, torch.zeros(160, 160)))
    assert torch.equal(nothing.codes, run(RTN, w, scheme, Inputs()).codes)


@pytest.mark.parametrize("panel", [64, 100, 512])
def test_the_factor_is_that_of_the_inverse(panel: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feedback, "_PANEL", panel)
    h = moments(300).double()
    factor = feedback.find_feedback(h.float()).factor_II
    damped = h / h.diagonal().mean() + 0.01 * torch.eye(300)
    assert torch.equal(factor, factor.triu())
    assert (factor @ damped @ factor.t() - torch.eye(300)).abs().max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_a_row_does_not_depend_on_its_block(scheme: Scheme):
    check_blocks(GPTQ, weight(21, 416, seed=3), scheme, Inputs(None, moments(416)))


def test_a_row_does_not_depend_on_how_far_errors_are_spread_at_a_time(monkeypatch: pytest.MonkeyPatch):
    w, scheme, inputs = weight(30, 700, seed=3), Scheme(4, False, "channel"), Inputs(None, moments(700))
    before = run(GPTQ, w, scheme, inputs)
    monkeypatch.setattr(feedback, "_SPREAD", 37)
    assert torch.equal(run(GPTQ, w, scheme, inputs).codes, before.codes)


def test_products_are_summed_exactly():
    """Any order of the columns of a block gives the same sums: that is why rows do not depend on their block."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(128, 40, generator=generator, dtype=torch.float64)
    right = torch.randn(128, 9, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-30, 33, 7)
    exact = left.t() @ right
    for values in (left, right):
        feedback._round_digits(values, 0)
    sums = left.t() @ right
    assert torch.allclose(sums, exact, rtol=0, atol=0) is False
    assert ((sums - exact).abs().amax(0) / exact.abs().amax(0)).max() < 1e-5
    order = torch.randperm(128, generator=generator)
    assert torch.equal(left[order].t() @ right[order], sums)
    one_by_one = torch.zeros_like(sums)
    for k in reversed(range(128)):
        one_by_one += left[k][:, None] * right[k]
    assert torch.equal(one_by_one, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_hostile_groups(scheme: Scheme, dtype: str):
    alike = torch.ones(64, 64) * 3e-5  # one direction alone: all errors go to the columns after
    for h in (moments(64), alike, moments(64, 1) * 1e30, moments(64) * 1e-30):
        for name, w in hostile(DTYPES[dtype]):
            q = run(GPTQ, w, scheme, Inputs(None, h))
            assert (q.scale > 0).all(), name
            assert problem(GPTQ, w, q, scheme, dtype) is None, name


def test_a_row_beyond_float32_does_not_touch_the_others():
    w, h, scheme = weight(6, 256, seed=9, dtype=torch.float32), moments(256), Scheme(4, False, "group", 32)
    before = run(GPTQ, w, scheme, Inputs(None, h))
    w[2, 7] = 3e38
    q = run(GPTQ, w, scheme, Inputs(None, h))
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(q.codes[others], before.codes[others])
    assert torch.equal(q.codes[2], run(SEARCH, w, scheme, Inputs(h.diagonal())).codes[2])


def test_codes_stay_near_the_nearest_ones(monkeypatch: pytest.MonkeyPatch):
    """The errors of loud inputs would all go into the quiet ones after them, which can say the same."""
    w, scheme = weight(32, 256, seed=1), Scheme(8, True, "channel")
    loud = (1.5 * torch.randn(256, generator=torch.Generator().manual_seed(0))).exp()
    h = moments(256, 32) * loud * loud[:, None]
    q = run(GPTQ, w, scheme, Inputs(None, h))
    nearest = (w.float() / q.scale.float() + 128).round().clamp(0, 255)
    assert int((q.codes.float() - nearest).abs().max()) == MAX_SHIFT
    assert problem(GPTQ, w, q, scheme, "BF16") is None
    monkeypatch.setattr(feedback, "MAX_SHIFT", 255)
    assert "steps from its value" in (problem(GPTQ, w, run(GPTQ, w, scheme, Inputs(None, h)), scheme, "BF16") or "")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_layouts_noise_and_verification(scheme: Scheme):
    w, inputs = weight(24, 64, seed=8), Inputs(None, moments(64))
    assert check_layouts(GPTQ, w, scheme, inputs) >= 2
    check_noise(GPTQ, w, scheme, inputs)
    q = run(GPTQ, w, scheme, inputs)
    assert problem(GPTQ, w, q, scheme, "BF16") is None
    assert "steps from its value" in (problem(GPTQ, w, swapped(q), scheme, "BF16") or "")
    for factor in (0.25, 0.5, 2.0, -1.0):
        assert problem(GPTQ, w, scaled(q, factor), scheme, "BF16"), factor


def test_a_scale_finer_than_any_ratio_is_found():
    """With the codes that are nearest for it: only the scale itself can tell."""
    w, scheme = weight(24, 64, seed=8), Scheme(4, False, "group", 32)
    q = scaled(run(RTN, w, scheme, Inputs()), 0.6)
    zero = q.zero_points().float().unsqueeze(-1)
    codes = (w.float().view(24, 2, 32) / q.scale.float().unsqueeze(-1) + zero).round().clamp(0, 15)
    finer = Quantized(codes.view(24, 64).to(torch.uint8), q.scale, q.offset, q.number)
    assert "times what the values of its group ask for" in (problem(GPTQ, w, finer, scheme, "BF16") or "")


def test_what_cannot_be_quantized():
    for scheme in SCHEMES:
        for bad in (float("nan"), float("inf")):
            w = weight(8, 64)
            w[5, 33] = bad
            with pytest.raises(NonFinite):
                run(GPTQ, w, scheme, Inputs(None, moments(64)))


def _broken(at: tuple[int, int], value: float) -> torch.Tensor:
    h = moments(64)
    h[at], h[at[::-1]] = value, value
    return h


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (None, "not known"),
        (torch.ones(64), "no square matrix"),
        (torch.ones(64, 32), "no square matrix"),
        (_broken((3, 3), float("nan")), "negative, NaN or Inf"),
        (_broken((3, 3), -1.0), "negative, NaN or Inf"),
        (_broken((3, 9), float("nan")), "NaN or Inf|semidefinite"),
        (_broken((3, 9), 1e6), "semidefinite"),
    ],
)
def test_what_cannot_be_moments(bad: torch.Tensor | None, why: str):
    with pytest.raises(BadInputs, match=why):
        GPTQ.span(iter(()), SCHEMES[0], Inputs(None, bad))


def test_moments_of_another_width():
    with pytest.raises(BadInputs, match="32 importances for 64 columns"):
        run(GPTQ, weight(2, 64), SCHEMES[0], Inputs(None, moments(32)))


def test_a_plan_without_moments_is_refused(tmp_path: Path):
    with pytest.raises(quantconvert.UsageError, match="--method gptq: expected a source of the second moments"):
        quantconvert.plan(write_checkpoint(tmp_path / "in"), method="gptq")


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors", "gptq", "rtn"])
def test_a_conversion_verifies(layout: str, tmp_path: Path):
    source, out, cut = write_checkpoint(tmp_path / "in"), tmp_path / "out", tmp_path / "cut"
    with METHODS.added(ToldGptq()):
        quantconvert.convert(source, out, method="told-gptq", group_size=32, format=layout, verify=True)
        quantconvert.convert(
            source, cut, method="told-gptq", group_size=32, format=layout, memory_limit="16MB", workers=1
        )
    assert digests(cut) == digests(out)


def test_a_plan_says_what_the_factor_takes(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    with METHODS.added(ToldGptq()):
        most = max(task.peak_nbytes for task in quantconvert.plan(source, method="told-gptq", group_size=32).tasks)
        with pytest.raises(quantconvert.UnsupportedError, match="at its peak"):
            quantconvert.plan(source, method="told-gptq", group_size=32, memory_limit="1MB")
    assert most > 8 * 256 * 256
