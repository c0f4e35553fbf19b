"""Equalized models in engines: in float16, in which AWQ is computed, nothing overflows; the defaults are no worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.engines.common import EXAMPLES, heldout_windows, load, logits

pytestmark = pytest.mark.usefixtures("auto_equalize")
MODELS = ("tiny-llama", "outlier-llama")


@pytest.fixture(scope="module", params=MODELS)
def example(request: pytest.FixtureRequest) -> Path:
    return EXAMPLES / str(request.param)


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over tokens of KL(p, q), nats, of logits."""
    a, b = p.log_softmax(-1), q.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def maxima(out: object) -> list[float]:
    return [float(out.abs().max())] if isinstance(out, Tensor) and out.is_floating_point() else []


def test_float16_has_room(example: Path, tmp_path: Path):
    """Engines load AWQ as float16: the largest number on the way of an equalized model is far from 65504."""
    quantconvert.convert(example, tmp_path / "awq")
    assert (tmp_path / "awq" / "quantconvert.factors").exists()
    quantconvert.dequantize(tmp_path / "awq", tmp_path / "half", dtype="float16")
    model = load(tmp_path / "half", dtype=torch.float16)
    largest: list[float] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _m, _i, out: largest.extend(maxima(out)))
    ids = heldout_windows()[:4]
    found = logits(model, ids)
    assert max(largest) < 65504 / 16
    exact = logits(load(tmp_path / "half"), ids)
    assert kl(exact, found) < 1e-4


def test_the_defaults_are_no_worse_than_plain_rounding(example: Path, tmp_path: Path):
    ids = heldout_windows()[::8]
    stored, lost = logits(load(example), ids), {}
    for name, flag in (("plain", False), ("default", None)):
        quantconvert.convert(example, tmp_path / name, equalize=flag)
        quantconvert.dequantize(tmp_path / name, tmp_path / f"{name}-floats", dtype="float32")
        lost[name] = kl(stored, logits(load(tmp_path / f"{name}-floats"), ids))
    print(f"{example.name}: KL {lost['plain']:.5f} plain, {lost['default']:.5f} by default")
    assert lost["default"] < 1.1 * lost["plain"]
    if example.name == "outlier-llama":
        assert lost["default"] < 0.6 * lost["plain"]
