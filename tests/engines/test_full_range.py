"""Scales of either sign in transformers: logits of the weights that an independent decoder reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import quantconvert
from tests.engines.common import TINY_LLAMA, heldout_loss, heldout_windows, load, logits, write_reference
from tests.engines.decoding import decode_all

OPTIONS: dict[str, Any] = {"symmetric": True, "group_size": 64, "equalize": False, "format": "compressed-tensors"}


def test_logits_are_the_reference(tmp_path: Path):
    losses = {}
    for method in ("rtn", "full-range"):
        out, reference = tmp_path / method, tmp_path / f"{method}-reference"
        quantconvert.convert(TINY_LLAMA, out, method=method, **OPTIONS)
        twin = load(write_reference(TINY_LLAMA, out, reference, decode_all(out, torch.float32)))
        ids = heldout_windows()[:4]
        torch.testing.assert_close(logits(load(out), ids), logits(twin, ids), rtol=0, atol=1e-4)
        losses[method] = heldout_loss(twin)
    assert losses["full-range"] < losses["rtn"]
