"""What the engine tests share: held-out loss, logits, loading that complains, and the dense reference.

The reference is the original checkpoint in float32 with each quantized weight replaced by what the independent decoders
of `tests/builders.py` read from the converted files. It is written to a folder under the original's own names, so
nothing but transformers' loading of plain checkpoints (which merges experts) stands between it and the comparison.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.builders import read_tensors, write_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LLAMA = EXAMPLES / "tiny-llama"
CONTEXT, WINDOWS = 256, 64  # the windows that the example was trained and judged on; 16 KiB of the held-out text


def heldout_windows() -> Tensor:
    """Token ids [WINDOWS, CONTEXT]: the start of the held-out text. A token of the example is a byte."""
    text = (EXAMPLES / "heldout.txt").read_bytes()[: WINDOWS * CONTEXT]
    return torch.tensor(list(text)).view(WINDOWS, CONTEXT)


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits in float32, without gradients."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def heldout_loss(model: Any) -> float:
    """Mean cross-entropy in nats per byte over the held-out windows."""
    total = 0.0
    for ids in heldout_windows().split(16):
        predicted, seen = logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(predicted, seen, reduction="sum").item()
    return total / (WINDOWS * (CONTEXT - 1))


def load(folder: Path, auto_class: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """A model by transformers, in float32 unless `dtype` says otherwise; every tensor must have found its place."""
    import transformers

    options = {"dtype": torch.float32, **options}
    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True, **options)
    problems = {key: found for key, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def write_result(original: Path, converted: Path, folder: Path, decoded: dict[str, Tensor]) -> Path:
    """The result in float32 as a plain checkpoint: the `decoded` weights, and what is kept as the result has it."""
    stored, names = read_tensors(converted), read_tensors(original)
    tensors = {name: stored[name] for name in names if name.removesuffix(".weight") not in decoded}
    tensors |= {f"{module}.weight": weight for module, weight in decoded.items()}
    assert tensors.keys() == names.keys()
    floats = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    return write_checkpoint(folder, floats, json.loads((original / "config.json").read_text()))


def write_reference(original: Path, converted: Path, folder: Path, decoded: dict[str, Tensor]) -> Path:
    """The original in float32 with the `decoded` weights; checks that all other tensors were left as they are."""
    kept, tensors = read_tensors(converted), read_tensors(original)
    for module, weight in decoded.items():
        assert weight.shape == tensors[f"{module}.weight"].shape, module
        tensors[f"{module}.weight"] = weight
    for name in tensors.keys() - {f"{module}.weight" for module in decoded}:
        assert torch.equal(kept[name], tensors[name]), name
    floats = {name: t.float().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}
    return write_checkpoint(folder, floats, json.loads((original / "config.json").read_text()))
