"""Every kind of source by ranges, with no more room than the largest step needs: a byte that is read before it has come
is a zero, and another result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import quantconvert
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.coded import awq_model, gptq_model, kimi_model
from tests.fused import LAYOUTS, fused_tensors
from tests.inputs import fp8_model, fused_fp8_model, fused_model, mxfp4_model, turned_model
from tests.snapshots import digests

Write = Callable[[Path], Path]


def fused(name: str) -> Write:
    layout = LAYOUTS[name]
    return lambda folder: write_checkpoint(folder, fused_tensors(layout), layout.config)


SOURCES: dict[str, Write] = {
    "llama": lambda folder: write_checkpoint(folder, llama_tensors(), LLAMA_CONFIG, shards=2),
    "fp8 block": lambda folder: fp8_model("block", (64, 64)).write(folder, ("scale_inv",)),
    "fused fp8": lambda folder: fused_fp8_model().write(folder),
    "mxfp4": lambda folder: mxfp4_model().write(folder, ("_scales",)),
    "turned": lambda folder: turned_model().write(folder),
    "fused transposed": lambda folder: fused_model(True).write(folder),
    "fused interleaved": lambda folder: fused_model(True, True).write(folder),
    "awq": lambda folder: awq_model().write(folder, ("scales",)),
    "gptq": lambda folder: gptq_model(4, "gptq", False, False).write(folder, ("qzeros",)),
    "kimi": lambda folder: kimi_model().write(folder),
    **{name: fused(name) for name in LAYOUTS},
}
OPTIONS: list[dict[str, Any]] = [{}, {"scheme": "NVFP4A16"}, {"scheme": "W8A8"}]


@pytest.fixture
def bucket() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/models", recursive=True)


@pytest.mark.usefixtures("auto_equalize", "toy_families")
@pytest.mark.parametrize("name", SOURCES)
def test_by_ranges(name: str, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = SOURCES[name](tmp_path / "in")
    for path in source.iterdir():
        bucket.pipe_file(f"/models/{path.name}", path.read_bytes())
    monkeypatch.setattr("quantconvert.streaming.AHEAD_NBYTES", 0)
    common: dict[str, Any] = {"requantize": True, "on_indivisible": "skip", "allow_incomplete": True}
    done = 0
    for number, options in enumerate(OPTIONS):
        try:
            quantconvert.convert(source, tmp_path / f"{number}", **common, **options)
        except quantconvert.QuantConvertError as error:
            with pytest.raises(type(error)):
                quantconvert.convert("memory://models", tmp_path / f"{number} ranges", **common, **options)
            continue
        quantconvert.convert("memory://models", tmp_path / f"{number} ranges", verify=True, **common, **options)
        assert digests(tmp_path / f"{number}") == digests(tmp_path / f"{number} ranges")
        done += 1
    assert done


def test_other_operations(bucket: Any, tmp_path: Path):
    """What is quantized is repacked and dequantized from where it lies."""
    source = SOURCES["awq"](tmp_path / "in")
    for path in source.iterdir():
        bucket.pipe_file(f"/models/{path.name}", path.read_bytes())
    for place, folder in (("memory://models", "ranges"), (str(source), "local")):
        quantconvert.repack(place, tmp_path / folder / "gptq", "gptq", verify=True, allow_incomplete=True)
        quantconvert.dequantize(place, tmp_path / folder / "plain", allow_incomplete=True)
    for name in ("gptq", "plain"):
        assert digests(tmp_path / "ranges" / name) == digests(tmp_path / "local" / name)


def test_without_holes(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the disk does not give back parts of files, whole ones are dropped: more room, the same result."""
    source = write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG, shards=4)
    for path in source.iterdir():
        bucket.pipe_file(f"/models/{path.name}", path.read_bytes())
    monkeypatch.setattr("quantconvert.streaming.AHEAD_NBYTES", 0)
    quantconvert.convert("memory://models", tmp_path / "holes", equalize=False)
    monkeypatch.setattr("quantconvert.machine.punch", lambda fd, offset, nbytes: False)
    quantconvert.convert("memory://models", tmp_path / "files", equalize=False)
    quantconvert.convert(source, tmp_path / "local", equalize=False)
    for name in ("holes", "files"):
        assert digests(tmp_path / name) == digests(tmp_path / "local")


def test_weights_that_are_read_before(bucket: Any, tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG)
    for path in source.iterdir():
        bucket.pipe_file(f"/models/{path.name}", path.read_bytes())
    for place, folder in (("memory://models", "ranges"), (str(source), "local")):
        quantconvert.convert(place, tmp_path / folder, target_bits=5.0, group_size=32, nan_policy="keep")
    assert digests(tmp_path / "ranges") == digests(tmp_path / "local")
