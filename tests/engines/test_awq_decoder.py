"""AWQ folders without an engine: a second decoder, in numpy bit arithmetic, and the held-out loss.

Both decoders follow the format's description and share no code with quantconvert: the one in `tests/builders.py` takes
words apart nibble by nibble and multiplies in float16, as readers do; the one here looks each weight up by its place
and multiplies in float64. They differ by float16's rounding alone, at most 2^-11 of a weight and mostly nothing (a code
has 5 bits, a scale that was a bfloat16 has 8): logits that reach about 20 move by 0.0004, where quantization moves them
by more than 1. Loss over the original's 1.139 nats per byte, measured: g128 +0.0027, g128 symmetric +0.0038, channel
+0.0022.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantconvert.api import convert
from tests.builders import read_tensors
from tests.engines.common import TINY_LLAMA, heldout_loss, heldout_windows, load, logits, write_reference
from tests.engines.decoding import decode_all

pytest.importorskip("transformers")

LOSS_BOUND = 0.012
LOGIT_TOLERANCE = 0.005
NIBBLE_OF_COLUMN = np.array([0, 4, 1, 5, 2, 6, 3, 7], dtype=np.uint32)
SCHEMES: dict[str, dict[str, Any]] = {
    "int4 g128 asymmetric": {},
    "int4 g128 symmetric": {"symmetric": True},
    "int4 channel": {"group_size": -1},
}


@dataclass
class Converted:
    options: dict[str, Any]
    folder: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module", params=list(SCHEMES.values()), ids=list(SCHEMES))
def converted(request, tmp_path_factory) -> Converted:
    folder = tmp_path_factory.mktemp("awq") / "out"
    convert(TINY_LLAMA, folder, format="awq", **request.param)
    return Converted(request.param, folder, read_tensors(folder))


@pytest.fixture(scope="module")
def original() -> Any:
    return load(TINY_LLAMA)


def codes_at(words: Tensor, columns: int) -> np.ndarray:
    """The code of each output column: word `column // 8`, and in it the nibble that AWQ's order gives the column."""
    column = np.arange(columns)
    return (words.numpy().view(np.uint32)[:, column // 8] >> (4 * NIBBLE_OF_COLUMN[column % 8])) & 15


def numpy_parts(tensors: dict[str, Tensor], module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, and the zero point and scale of each weight: float64 [O, I]."""
    scales = tensors[f"{module}.scales"].numpy().astype(np.float64)
    columns = scales.shape[1]
    codes = codes_at(tensors[f"{module}.qweight"], columns)
    group = np.arange(len(codes)) // (len(codes) // len(scales))
    zeros = codes_at(tensors[f"{module}.qzeros"], columns)[group]
    return codes.T.astype(np.float64), zeros.T.astype(np.float64), scales[group].T


def numpy_weight(tensors: dict[str, Tensor], module: str) -> Tensor:
    codes, zeros, scales = numpy_parts(tensors, module)
    return torch.from_numpy(np.ascontiguousarray((codes - zeros) * scales))


def test_two_decoders_agree(converted: Converted):
    for module, weight in decode_all(converted.folder).items():
        assert weight.dtype == torch.float16
        assert torch.equal(numpy_weight(converted.tensors, module).to(torch.float16), weight), module


def test_weights_are_about_half_a_step_from_the_original(converted: Converted):
    """At most half a step, and at the ends of a range what rounding its scale and zero point to bfloat16 costs there.

    A relative error of 2^-9 is 0.03 steps at 15 steps from zero; up to four such roundings add up when asymmetric.
    """
    source = read_tensors(TINY_LLAMA)
    for module in decode_all(converted.folder):
        codes, zeros, scales = numpy_parts(converted.tensors, module)
        error = np.abs((codes - zeros) * scales - source[f"{module}.weight"].double().numpy()) / scales
        assert error.max() < (0.53 if converted.options.get("symmetric") else 0.62), module
        if converted.options.get("symmetric"):
            assert (zeros == 8).all(), module


def test_logits_agree(converted: Converted, original: Any, tmp_path):
    ids = heldout_windows()[:4]
    decoded = decode_all(converted.folder)
    exact = {module: numpy_weight(converted.tensors, module).float() for module in decoded}
    folders = [
        write_reference(TINY_LLAMA, converted.folder, tmp_path / str(i), w) for i, w in enumerate((decoded, exact))
    ]
    one, other = (logits(load(folder), ids) for folder in folders)
    torch.testing.assert_close(one, other, rtol=0, atol=LOGIT_TOLERANCE)
    assert (one - logits(original, ids)).abs().max() > 100 * LOGIT_TOLERANCE


def test_heldout_loss(converted: Converted, original: Any, tmp_path):
    reference = load(
        write_reference(TINY_LLAMA, converted.folder, tmp_path / "reference", decode_all(converted.folder))
    )
    assert heldout_loss(reference) < heldout_loss(original) + LOSS_BOUND
