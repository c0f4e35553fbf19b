"""Equalized models in engines: in float16, in which AWQ is computed, nothing overflows; the defaults are no worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.engines.common import EXAMPLES, heldout_windows, load, logits, write_result
from tests.engines.decoding import decode_all

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


SCHEMES: dict[str, dict[str, Any]] = {
    "int4 symmetric": {"format": "compressed-tensors"},
    "int8 equalized": {"bits": 8, "equalize": True},
    "int4 searched": {"format": "compressed-tensors", "method": "search"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_it_as_it_is(example: Path, tmp_path: Path, scheme: str):
    """Logits are those of the weights that an independent decoder reads, beside the norms that the result has."""
    quantconvert.convert(example, tmp_path / "out", **SCHEMES[scheme])
    decoded = decode_all(tmp_path / "out", torch.float32)
    reference = load(write_result(example, tmp_path / "out", tmp_path / "plain", decoded))
    ids = heldout_windows()[:2]
    torch.testing.assert_close(logits(load(tmp_path / "out"), ids), logits(reference, ids), rtol=0, atol=1e-3)


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
