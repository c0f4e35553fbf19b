"""Hadamard matrices and the fast products with them, against the definitions and plain matrix products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantconvert.sources.steps.hadamard import Factors, factors_of, paley, signs
from quantconvert.sources.steps.mixing import Mixer

# Widths of models on the Hub and of their heads; the last are odd multiples that no construction here reaches.
SIZES = (2, 12, 20, 28, 36, 64, 80, 96, 100, 128, 160, 192, 256, 576, 640, 768, 896, 960, 1152, 1280, 52, 116)
EXPECTED = {
    2: (1, 1, 2), 12: (1, 12, 1), 28: (1, 28, 1), 576: (1, 36, 16), 896: (1, 28, 32), 960: (1, 60, 16),
    2048: (1, 1, 2048), 2304: (1, 36, 64), 2560: (1, 20, 128), 2688: (1, 84, 32), 2880: (1, 180, 16),
    3072: (1, 12, 256), 3584: (1, 28, 128), 5120: (1, 20, 256), 5376: (1, 84, 64), 7168: (1, 28, 256),
    100: (5, 20, 1), 52: (13, 1, 4), 7: (7, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(("size", "expected"), EXPECTED.items())
def test_a_size_has_its_factors(size: int, expected: tuple[int, int, int]):
    assert factors_of(size) == Factors(*expected)
    assert math.prod(expected) == size


@pytest.mark.parametrize("order", [1, 12, 20, 28, 36, 44, 60, 84, 180, 252])
def test_paley_s_matrices_are_hadamard_s(order: int):
    """Entries 1 and -1, rows at right angles: the whole definition."""
    h = torch.tensor(paley(order), dtype=torch.float64)
    assert h.abs().eq(1).all()
    assert torch.equal(h @ h.t(), order * torch.eye(order, dtype=torch.float64))


def test_the_signs_are_splitmix64_s():
    """The first outputs from seed 0, as its authors' program prints them: E220.., 6E78.., 06C4.., F88B.., 1B39.."""
    assert signs(5) == (1, -1, -1, 1, -1)
    assert 400 < sum(sign > 0 for sign in signs(1000)) < 600
    assert signs(1000)[:5] == signs(5)


def dense(size: int) -> Tensor:
    """Q as a float64 matrix, from the definition: signs, then blocks of Paley's times Sylvester's matrix."""
    blocks, order, power = factors_of(size)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    block = torch.kron(torch.tensor(paley(order), dtype=torch.float64), sylvester)
    whole = torch.block_diag(*[block] * blocks) / math.sqrt(order * power)
    return torch.tensor(signs(size), dtype=torch.float64)[:, None] * whole


@pytest.mark.parametrize("size", SIZES)
def test_the_fast_product_is_the_matrix_product(size: int):
    q = dense(size)
    assert torch.allclose(q @ q.t(), torch.eye(size, dtype=torch.float64))
    x_NC = torch.randn(2 * size, 5, generator=torch.Generator().manual_seed(size))
    expected = torch.block_diag(q, q).t() @ x_NC.double()
    mixed, rows = x_NC.clone(), x_NC.t().contiguous()
    Mixer(size).mix(mixed)
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=1e-5)
    Mixer(2 * size).mix_rows(wide := torch.cat((rows, rows), 1)[:, : 2 * size])  # not contiguous
    assert not wide.is_contiguous()
    torch.testing.assert_close(wide.double(), rows.double() @ dense(2 * size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [96, 128, 100])
def test_the_bytes_do_not_depend_on_the_cut(size: int):
    x_NC = torch.randn(size, 37, generator=torch.Generator().manual_seed(1))
    whole = x_NC.clone()
    Mixer(size).mix(whole)
    mixer = Mixer(size)
    for left, right in ((0, 1), (1, 20), (20, 37)):
        part = x_NC[:, left:right].contiguous()
        mixer.mix(part)
        assert torch.equal(part, whole[:, left:right])
        rows = x_NC[:, left:right].t().contiguous()
        mixer.mix_rows(rows)
        assert torch.equal(rows, whole[:, left:right].t())
