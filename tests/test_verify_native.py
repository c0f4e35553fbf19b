"""Verification in C says what the reference says, and passes nothing that the reference would not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError
from quantconvert.factors import FACTORS
from quantconvert.kernels import VARIABLE
from quantconvert.kernels.native.library import find_library
from quantconvert.verification import Verification, quick, stored, values
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.equalized import OPTIONS, loud, repair
from tests.inputs import fused_model

LIBRARY = find_library()
LEVELS = LIBRARY.levels if LIBRARY else ()
CONFIG = LLAMA_CONFIG | {"num_hidden_layers": 1}
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="installed without the C kernel")
# Every packing, zero points in words and in bytes, per group, channel and tensor.
KINDS: dict[str, dict[str, Any]] = {
    "awq": {"format": "awq", "group_size": 32},
    "gptq": {"format": "gptq", "group_size": 32},
    "gptq asymmetric": {"format": "gptq", "group_size": 32, "symmetric": False},
    "gptq int8 asymmetric": {"format": "gptq", "bits": 8, "group_size": -1, "symmetric": False},
    "compressed-tensors": {"format": "compressed-tensors", "group_size": 32},
    "compressed-tensors asymmetric": {"format": "compressed-tensors", "group_size": 32, "symmetric": False},
    "compressed-tensors tensor": {"format": "compressed-tensors", "scheme": "W4A16_ASYM:tensor"},
    "compressed-tensors int8": {"format": "compressed-tensors", "scheme": "W8A16_ASYM:channel"},
    "W8A8": {"format": "compressed-tensors", "scheme": "W8A8"},
    "rtn": {"format": "rtn", "group_size": 32, "symmetric": False},
    "rtn int8": {"format": "rtn", "bits": 8, "symmetric": False, "group_size": 32},
    "rtn tensor": {"format": "rtn", "scheme": "W8A16:tensor"},
    "search": {"format": "awq", "group_size": 32, "method": "search"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def uneven(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A layer some of whose columns, and groups, are far louder than others; a group of zeros."""
    tensors = llama_tensors(layers=1, dtype=dtype)
    for i, (name, tensor) in enumerate(tensors.items()):
        if "_proj" in name:
            generator = torch.Generator().manual_seed(i)
            tensor = tensor.float() * torch.randn(tensor.shape[1], generator=generator).exp()
            tensor[3, :32] = 0
            tensors[name] = tensor.to(dtype)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("native") / "source", uneven(), CONFIG)


@pytest.fixture(scope="module")
def results(source: Path) -> Callable[[str], Path]:
    """The converted folder of a kind, made once."""

    def convert(kind: str) -> Path:
        out = source.parent / kind.replace(" ", "-")
        if not out.exists():
            quantconvert.convert(source, out, **KINDS[kind])
        return out

    return convert


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verification]:
    """Verify by a kernel; `alone`: what it leaves to the reference fails."""

    def verify(kernel: str, out: Path, source: Path | None = None, alone: bool = False, **how: Any) -> Verification:
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, kernel)
            if alone:
                patch.setattr(values, "load_torch", lambda: pytest.fail("left to the reference"))
            return quantconvert.verify(out, source, **how)

    return verify


DTYPES = [(kind, torch.bfloat16) for kind in KINDS]
DTYPES += [(kind, dtype) for kind in ("awq", "rtn tensor") for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("kind", "dtype"), DTYPES, ids=str)
def test_the_same_is_said_without_the_reference(
    kind: str, dtype: torch.dtype, tmp_path: Path, verify: Callable[..., Verification]
):
    source, out = write_checkpoint(tmp_path / "in", uneven(dtype), CONFIG), tmp_path / "out"
    quantconvert.convert(source, out, **KINDS[kind])
    expected = verify("torch", out, source)
    assert expected.is_ok
    assert len(expected.errors) == 7
    for level in LEVELS:
        assert verify(level, out, source, alone=True) == expected
    assert verify("native", out, alone=True) == verify("torch", out)


@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq int8 asymmetric"])
def test_what_is_stored_turned_is_read_in_parts(
    kind: str, results: Callable[[str], Path], source: Path, verify: Callable[..., Verification],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    expected = verify("torch", results(kind), source)
    monkeypatch.setattr(quick, "HELD_NBYTES", 3000)
    monkeypatch.setattr(quick, "SLAB_NBYTES", 5000)
    monkeypatch.setattr(quick, "TURNED_ROWS", 16)
    assert verify("native", results(kind), source, alone=True) == expected
    monkeypatch.setattr(Files, "fd", lambda self, file: None)  # as if it were elsewhere
    assert verify("native", results(kind), source, alone=True) == expected


def test_what_cannot_be_read_is_a_finding(
    results: Callable[[str], Path], source: Path, verify: Callable[..., Verification], monkeypatch: pytest.MonkeyPatch
):
    """A file that ends while it is read, in what is read in parts too."""

    def short(self: Files, file: str, buffer: memoryview, offset: int) -> None:
        raise CheckpointError(f"`{file}` became shorter")

    monkeypatch.setattr(quick, "HELD_NBYTES", 3000)
    monkeypatch.setattr(stored, "gather", lambda *args: False)
    monkeypatch.setattr(Files, "read_into", short)
    found = verify("native", results("awq"), source)
    assert {finding.message for finding in found.findings} == {"`model.safetensors` became shorter"}
    assert len(found.findings) == 12


def tensors_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """Each tensor of a file: its name, and where its bytes begin and end."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            yield name, begin + entry["data_offsets"][0], begin + entry["data_offsets"][1]


def flip_bits(out: Path, file: str, chosen: Callable[[str], bool], dice: random.Random) -> None:
    """One bit of each tensor whose name is chosen."""
    content = bytearray((out / file).read_bytes())
    for name, begin, end in tensors_of(out / file):
        if chosen(name):
            content[dice.randrange(begin, end)] ^= 1 << dice.randrange(8)
    (out / file).write_bytes(content)


PARTS = {"codes": ("weight_packed", "qweight", "weight"), "scales": ("scales", "weight_scale"),
         "zero points": ("qzeros", "weight_zero_point")}  # fmt: skip


@every_kind
@pytest.mark.parametrize("part", PARTS)
def test_flipped_bits(
    kind: str, part: str, results: Callable[[str], Path], source: Path, tmp_path: Path,
    verify: Callable[..., Verification],
):  # fmt: skip
    """A bit in each weight at once: what shows, and what does not, is the same; checksums are left out."""
    dice, found = random.Random(len(kind)), 0
    for i in range(2):
        out = shutil.copytree(results(kind), tmp_path / f"{i}")
        method = json.loads((out / "quantconvert.json").read_text())["job"].get("method", "rtn")
        (out / "quantconvert.json").unlink()
        flip_bits(out, "model.safetensors", lambda name: "_proj" in name and name.endswith(PARTS[part]), dice)
        expected = verify("torch", out, source, method=method)
        assert verify("native", out, source, method=method) == expected
        assert verify("native", out, source) == verify("torch", out, source)
        assert verify("native", out) == verify("torch", out)
        found += len(expected.findings)
    assert found or (part == "zero points" and "asym" not in kind.lower())


def test_flipped_bits_of_factors(tmp_path: Path, verify: Callable[..., Verification]):
    """Of equalized results norms and weights are read through factors."""
    source, out = write_checkpoint(tmp_path / "in", loud()), tmp_path / "out"
    quantconvert.convert(source, out, **OPTIONS)
    expected = verify("torch", out, source)
    assert expected.is_ok
    for level in LEVELS:
        assert verify(level, out, source, alone=True) == expected
    dice, found = random.Random(5), 0
    for i in range(6):
        changed = shutil.copytree(out, tmp_path / f"{i}")
        flip_bits(changed, FACTORS, lambda name: dice.random() < 0.3, dice)
        repair(changed)
        expected = verify("torch", changed, source)
        assert verify("native", changed, source) == expected
        found += len(expected.findings)
    assert found > 6


def test_experts_of_one_tensor(tmp_path: Path, verify: Callable[..., Verification], toy_families: None):
    """Rows of a stored tensor that has three axes, every second one among them."""
    source, out = fused_model(False).write(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out, group_size=32, format="compressed-tensors")
    expected = verify("torch", out, source)
    assert len(expected.errors) > 3
    assert verify("native", out, source, alone=True) == expected


def test_sources_with_nan_and_inf(source: Path, results: Callable[[str], Path], tmp_path: Path,
                                  verify: Callable[..., Verification]):  # fmt: skip
    """Not what was converted: said to differ, and by no error that is no number."""
    tensors = uneven()
    for i, (name, tensor) in enumerate((n, t) for n, t in tensors.items() if "_proj" in n):
        tensor[i, 5] = (torch.nan, torch.inf, -torch.inf)[i % 3]
        assert name in tensors
    other = write_checkpoint(tmp_path / "other", tensors, CONFIG)
    found = verify("native", results("compressed-tensors"), other)
    assert found.to_json() == verify("torch", results("compressed-tensors"), other).to_json()
    assert len(found.findings) == 7


@pytest.mark.process
def test_torch_is_not_imported(tmp_path: Path):
    source, out = write_checkpoint(tmp_path / "in", loud()), tmp_path / "out"
    quantconvert.convert(source, out, format="awq", equalize=True, group_size=32)
    text = f"""
import sys, quantconvert
quantconvert.convert({str(source)!r}, {str(tmp_path / "plain")!r}, equalize=False, group_size=32, verify=True)
assert quantconvert.verify({str(out)!r}, {str(source)!r}).is_ok
assert quantconvert.verify({str(out)!r}).is_ok
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", text], check=True)
