"""AWQ and GPTQ folders of one model, what an independent decoder reads from them, and comparisons with a loaded model.

A quantized layer shown the identity matrix answers with its own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.api import convert
from tests.engines.common import TINY_LLAMA, heldout_windows, load, logits, write_reference
from tests.engines.decoding import decode_all


@dataclass
class Converted:
    """A converted folder, its weights as decoded, and transformers' model of those weights in a plain checkpoint."""

    folder: Path
    decoded: dict[str, Tensor]
    reference: Any


def convert_decode(original: Path, work: Path, **options: Any) -> Converted:
    """Convert `original` into `work`, and load what the decoder reads there."""
    folder = work / "out"
    convert(original, folder, **options)
    decoded = decode_all(folder)
    return Converted(folder, decoded, load(write_reference(original, folder, work / "reference", decoded)))


class Conversions:
    """The example in the schemes of a module, each converted when first asked for."""

    def __init__(self, schemes: Mapping[str, dict[str, Any]], work: Callable[[], Path], **options: Any) -> None:
        self.schemes, self.work, self.options = schemes, work, options
        self.found: dict[str, Converted] = {}

    def __call__(self, scheme: str) -> Converted:
        if scheme not in self.found:
            self.found[scheme] = convert_decode(TINY_LLAMA, self.work(), **self.options, **self.schemes[scheme])
        return self.found[scheme]


def assert_weights(model: Any, decoded: dict[str, Tensor]) -> None:
    """Bit for bit; and what is not quantized stayed a plain layer."""
    for name, weight in decoded.items():
        layer = model.get_submodule(name)
        assert not isinstance(layer, torch.nn.Linear), name
        with torch.no_grad():
            answer = layer(torch.eye(weight.shape[1], dtype=torch.float16))
        assert torch.equal(answer.t(), weight), name
    plain = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert plain.isdisjoint(decoded)


def assert_logits(model: Any, reference: Any, tolerance: float, ids: Tensor | None = None) -> None:
    """On four windows of the held-out text unless `ids` are given."""
    ids = heldout_windows()[:4] if ids is None else ids
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=0, atol=tolerance)
