"""Round-to-nearest: what the arithmetic must give, on ordinary and on hostile groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantconvert.methods import NonFinite, ScaleOverflow
from quantconvert.methods import rounding as rtn
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme
from tests.builders import weight

SCHEMES = [
    Scheme(bits, symmetric, strategy, 32 if strategy == "group" else None)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel", "tensor")
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(w: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype | None = None) -> Quantized:
    return rtn.quantize(w.float().clone(), scheme, w.dtype, scale_dtype or w.dtype)


def dequantized(q: Quantized, scheme: Scheme) -> torch.Tensor:
    """float64 [O, I], group by group, written without the code under test."""
    rows, columns = q.codes.shape
    scale = q.scale.double().expand(rows, -1)
    zero_point = q.zero_points().double().expand(rows, -1)
    width = columns // scale.shape[1]
    return (q.codes.double() - zero_point.repeat_interleave(width, 1)) * scale.repeat_interleave(width, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_error_is_at_most_half_a_step_and_range_is_used(scheme: Scheme, dtype: torch.dtype):
    w = weight(16, 64, seed=3, dtype=dtype)
    q = run(w, scheme)
    steps = q.scale.double().expand(16, -1).repeat_interleave(64 // q.scale.shape[-1], 1)
    error = (dequantized(q, scheme) - w.double()).abs() / steps
    # half a step, plus what rounding the scale to bf16 can move the outermost codes
    assert error.max() <= 0.5 + (1.0 if scheme.num_bits == 8 else 0.1)
    assert error.mean() < 0.3
    top = 2**scheme.num_bits - 1
    assert q.codes.max() >= top - 1
    assert q.codes.dtype == torch.uint8


def test_symmetric_scale_divides_by_half_of_all_steps():
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = -7.5, 3.0
    q = run(w, Scheme(4, True, "group", 32))
    assert q.scale.item() == 1.0  # 7.5 / 7.5, so that -7.5 would be code -8 after rounding half to even
    assert q.codes[0, :2].tolist() == [0, 11]
    assert q.offset is None


def test_asymmetric_zero_point_and_codes_by_hand():
    w = torch.linspace(-1, 2, 16).reshape(1, 16)
    q = run(w, Scheme(4, False, "channel"))
    assert q.scale.item() == pytest.approx(0.2)
    assert q.offset is not None
    assert q.offset.item() == 5
    assert q.codes[0].tolist() == list(range(16))


def test_ties_go_to_even_as_in_rint():
    w = torch.tensor([[15.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0]])
    q = run(w, Scheme(4, True, "channel"))
    assert q.scale.item() == 2.0
    halves = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, -1.25]])
    assert (q.codes[0, 1:7].float() - 8).tolist() == torch.round(halves)[0].tolist()
    w = torch.tensor([[7.5, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]])
    q = run(w, Scheme(4, True, "channel"))
    assert (q.codes[0].int() - 8).tolist() == [7, 0, 2, 2, 4, 0, -2, -2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
@pytest.mark.parametrize("scale_dtype", ["own", torch.float16])
def test_all_zero_group_gives_exact_zeros(scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype | str):
    q = run(torch.zeros(8, 64, dtype=dtype), scheme, None if isinstance(scale_dtype, str) else scale_dtype)
    assert (q.scale == 1).all()
    assert (dequantized(q, scheme) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
@pytest.mark.parametrize("kind", ["denormal", "constant", "negative constant", "outlier", "extremes", "zeros inside"])
def test_hostile_groups_stay_finite(scheme: Scheme, dtype: torch.dtype, kind: str):
    info = torch.finfo(dtype)
    w = torch.full((8, 64), {"constant": 0.37, "negative constant": -0.37}.get(kind, 0.0), dtype=dtype)
    if kind == "denormal":
        w[:, ::3] = info.smallest_normal * info.eps * 5
    elif kind == "outlier":
        w += 0.01
        w[3, 5] = info.max / 2
    elif kind == "extremes":
        w[:, 0], w[:, 1] = info.max, -info.max
    elif kind == "zeros inside":
        w[:, ::2] = 0.5
    q = run(w, scheme)
    assert torch.isfinite(q.scale.float()).all()
    assert (q.scale > 0).all()
    back = dequantized(q, scheme)
    assert torch.isfinite(back).all()
    assert (back[w == 0] == 0).all(), "zero weights stay exactly zero"


def test_scale_below_float16_becomes_its_smallest_number_and_codes_follow_the_stored_scale():
    w = torch.full((1, 32), 1e-9)
    q = run(w, Scheme(4, True, "group", 32), torch.float16)
    assert q.scale.item() == 2.0**-24
    assert (q.codes == 8).all()


def test_scale_above_float16_is_an_error():
    with pytest.raises(ScaleOverflow):
        run(torch.full((1, 32), 1e6), Scheme(4, True, "group", 32), torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_nan_and_inf_are_noticed(scheme: Scheme, bad: float):
    w = weight(8, 64)
    w[5, 33] = bad
    with pytest.raises(NonFinite):
        run(w, scheme)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_codes_equal_a_float64_free_reference(data: st.DataObject):
    """The magic-number rounding equals clamp and rint, value by value, for any float32 group."""
    values = data.draw(
        st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=32, max_size=32)
    )
    scheme = data.draw(st.sampled_from([Scheme(b, s, "channel") for b in (4, 8) for s in (True, False)]))
    w = torch.tensor([values], dtype=torch.float32)
    q = rtn.quantize(w.clone(), scheme, torch.float32, torch.float32)
    half = 2 ** (scheme.num_bits - 1)
    zero_point = q.zero_points().float() - half
    expected = torch.round(torch.clamp(w / q.scale + zero_point, -half, half - 1)) + half
    assert torch.equal(q.codes.float(), expected)
