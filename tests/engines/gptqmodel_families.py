"""AWQ and GPTQ folders of the families as transformers loads them by GPTQModel's plain kernels: bounds, comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AwqConfig
from transformers.utils.quantization_config import AwqBackend

from tests.engines.common import load, write_reference
from tests.engines.families import Case, convert, outputs, save

AWQ_TOLERANCE, GPTQ_TOLERANCE = 0.008, 1e-4


def assert_same(case: Case, source: Path, folder: Path, decoded: dict, tolerance: float, config: Any) -> None:
    reference = load(write_reference(source, folder, folder.parent / "reference", decoded), case.model)
    model = load(folder, case.model, quantization_config=config)
    assert sum(hasattr(module, "qweight") for module in model.modules()) == len(decoded)
    moved = []
    original = outputs(case, load(source, case.model))
    for found, expected, before in zip(outputs(case, model), outputs(case, reference), original, strict=True):
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= tolerance * largest
        moved.append((before - expected).abs().max() / largest)
    assert max(moved) > 10 * tolerance


def awq(case: Case, work: Path) -> tuple[Path, Path, AwqConfig]:
    source = save(case, work / "in")
    folder = convert(source, work / "out", format="awq")
    return source, folder, AwqConfig(bits=4, group_size=32, backend=AwqBackend.TORCH_AWQ)
