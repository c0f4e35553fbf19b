"""A weight from file to file in one call of the C library: bytes, sums and noise as torch's, however it is cut."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

import quantconvert
from quantconvert.checkpoint import LocalFolder
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.kernels.native.library import find_library
from quantconvert.planning import Plan, memory
from quantconvert.run import work
from quantconvert.run.pieces import Sums, pieces_of
from quantconvert.run.result import TaskResult
from quantconvert.run.shards import ShardWriter
from quantconvert.run.work import Bench, Errand
from tests import byte_cases
from tests.builders import write_checkpoint

LIBRARY = find_library()
native = pytest.mark.skipif(
    LIBRARY is None or os.environ.get("QUANTCONVERT_KERNEL") == "torch", reason="the C kernel is not used here"
)
SCHEMES = ("W4A16:g32", "W4A16_ASYM:g32", "W8A16_ASYM:channel", "W4A16_ASYM:tensor")


def carried_out(plan: Plan, source: Path, folder: Path) -> tuple[list[TaskResult], dict[str, bytes], list[bool]]:
    """Results of all tasks, the files that they made, and of which tasks a kernel took the whole way."""
    folder.mkdir()
    files, writer = Files(LocalFolder(source)), ShardWriter(plan, folder)
    bench = Bench(files, writer, plan.execution, lambda name, nbytes: None)
    try:
        found = [bench.carry_out(index, task) for index, task in enumerate(plan.tasks)]
        direct = [Errand(i, task, files).kernel is not None for i, task in enumerate(plan.tasks) if not task.reason]
        for task, result in zip(plan.tasks, found, strict=True):
            for output, text in zip(task.outputs, result.sums, strict=bool(result.sums)):
                assert text.endswith(f":{writer.written_sum(task, output) % 2**64:016x}"), output.name
    finally:
        writer.close()
        files.close()
    return found, {path.name: path.read_bytes() for path in folder.iterdir()}, direct


@native
@pytest.mark.parametrize("layout", ["awq", "compressed-tensors", "gptq", "rtn"])
@pytest.mark.parametrize("kind", ["plain", "fp8", "granite", "llama4", "gpt2"])
def test_it_is_torch_to_the_bit(kind: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whole rows, rows of experts, every other row, and columns; small tiles, and slabs of one or a few of them."""
    source = byte_cases.source_folder(tmp_path, kind)
    count = 0
    for scheme in SCHEMES:
        for i, (tile, slab, turned) in enumerate([(1 << 18, 1 << 23, 1 << 30), (1000, 1, 1), (3000, 9000, 5000)]):
            monkeypatch.setattr(memory, "TILE_ELEMENTS", tile)
            monkeypatch.setattr(memory, "SLAB_ELEMENTS", slab)
            monkeypatch.setattr(memory, "STRIP_ELEMENTS", slab)
            monkeypatch.setattr(memory, "MAX_TURNED_NBYTES", turned)
            try:
                plan = quantconvert.plan(source, format=layout, scheme=scheme, allow_incomplete=True, requantize=True)
            except quantconvert.QuantConvertError:
                continue
            name = f"{scheme.replace(':', '-')}{i}"
            results, content, direct = carried_out(plan, source, tmp_path / name)
            with monkeypatch.context() as without:
                without.setattr(work, "find_direct", lambda way: None)
                reference, expected, _ = carried_out(plan, source, tmp_path / f"{name}-torch")
            assert content == expected
            assert results == reference
            assert all(direct)
            count += 1
    assert count >= 3


def test_sums_are_those_of_xxhash(monkeypatch: pytest.MonkeyPatch):
    data = bytearray(random.Random(0).randbytes(5000))
    sizes = [*range(100), 255, 256, 4999, 5000]
    for seed in (0, 1, 1 << 40):
        if LIBRARY is not None:
            for size in sizes:
                part = memoryview(data)[:size]
                assert LIBRARY.xxh64(part, seed) == xxhash.xxh64_intdigest(bytes(part), seed)
    monkeypatch.setenv("QUANTCONVERT_KERNEL", "torch")
    sums = Sums()
    found = {sums.of(memoryview(data)[:size], seed) for size in (0, 1, 100) for seed in (0, 1, 1 << 20)}
    assert len(found) == 9


def test_pieces_cover_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 700)
    source = write_checkpoint(tmp_path)
    for layout in ("awq", "compressed-tensors", "gptq", "rtn"):
        for task in quantconvert.plan(source, format=layout, scheme="W4A16_ASYM:g32").tasks:
            for output in task.outputs:
                ends = list(pieces_of(task, output))
                assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])], output.name
                assert ends[-1][1] == output.nbytes, output.name


@pytest.fixture
def one_task(tmp_path: Path) -> tuple[Plan, Path, Path]:
    """A checkpoint of small weights, its plan, and an empty folder."""
    source, folder = write_checkpoint(tmp_path / "model"), tmp_path / "partial"
    folder.mkdir()
    return quantconvert.plan(source, format="compressed-tensors", equalize=False), source, folder


def bench_of(plan: Plan, source: Path, folder: Path) -> Bench:
    return Bench(Files(LocalFolder(source)), ShardWriter(plan, folder), plan.execution, lambda name, nbytes: None)


@native
@pytest.mark.parametrize("operation", ["quantize", "copy"])
def test_a_source_that_became_shorter(one_task: tuple[Plan, Path, Path], operation: str):
    plan, source, folder = one_task
    index, task = max((i, t) for i, t in enumerate(plan.tasks) if t.operation == operation and t.outputs)
    bench = bench_of(plan, source, folder)
    os.truncate(source / task.source.file, task.source.values.offset + 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        bench.carry_out(index, task)


@native
@pytest.mark.parametrize("operation", ["quantize", "copy"])
def test_a_result_that_cannot_be_written(one_task: tuple[Plan, Path, Path], operation: str):
    plan, source, folder = one_task
    index, task = next((i, t) for i, t in enumerate(plan.tasks) if t.operation == operation)
    bench = bench_of(plan, source, folder)
    shard = task.outputs[0].shard
    bench.writer.fd(shard)
    with open(folder / f"{plan.shards[shard].file}.partial", "rb") as unwritable:
        os.dup2(unwritable.fileno(), bench.writer.fd(shard))
        with pytest.raises(OutputError, match=r"cannot write tensor .*: Bad file descriptor"):
            bench.carry_out(index, task)


CHILD = """
import sys
import quantconvert
result = quantconvert.convert(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))
print("torch" in sys.modules, result.peak_rss_nbytes)
"""


def child(source: Path, out: Path, **options: Any) -> tuple[bool, int]:
    """Whether a process of its own imported torch for a conversion, and its peak memory in bytes."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), repr(options)]
    imported, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return imported == "True", int(peak)


@native
@pytest.mark.process
@pytest.mark.parametrize(
    "options", [{"format": name} for name in ("awq", "compressed-tensors", "gptq", "rtn")], ids=str
)
def test_a_plain_conversion_imports_no_torch(tmp_path: Path, options: dict[str, Any]):
    imported, _ = child(write_checkpoint(tmp_path / "model"), tmp_path / "out", equalize=False, **options)
    assert not imported
