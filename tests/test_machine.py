"""Systems that lack calls which Linux has: everything works without them, and no other file makes them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantconvert
from quantconvert import machine
from tests.builders import write_checkpoint
from tests.snapshots import digests

PACKAGE = Path(quantconvert.__file__).parent
MISSING = (
    "sched_getaffinity", "sched_setaffinity", "fdatasync", "posix_fallocate", "posix_fadvise", "copy_file_range",
    "sendfile", "preadv", "pwritev", "memfd_create", "splice",
)  # fmt: skip
# macOS has neither the calls nor, where Python was built without it, the module; the result must be the same.
WITHOUT = f"""
import os, sys
for name in {MISSING!r}:
    if hasattr(os, name):
        delattr(os, name)
sys.modules["fcntl"] = None
import quantconvert
from quantconvert.events import Note, ShardWritten
source, out = sys.argv[1:]
said = []
plan = quantconvert.plan(source, out)
assert plan.execution.workers == os.cpu_count()
assert quantconvert.inspect(source).to_json()
def stop(event):
    if isinstance(event, ShardWritten):
        raise KeyboardInterrupt
try:
    quantconvert.convert(source, out, max_shard_size="60KB", report=stop)
except KeyboardInterrupt:
    pass
quantconvert.convert(source, out, max_shard_size="60KB", verify=True, report=said.append)
notes = [event.message for event in said if isinstance(event, Note)]
assert any(text.startswith("continuing: ") for text in notes), notes
assert any("has no locks" in text for text in notes), notes
"""


@pytest.mark.process
@pytest.mark.usefixtures("auto_equalize")
def test_everything_works_without_the_calls(tmp_path: Path):
    source = write_checkpoint(tmp_path / "source", shards=2)
    (source / "tokenizer.json").write_text("{}")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    quantconvert.convert(source, tmp_path / "whole", max_shard_size="60KB")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_no_other_file_makes_such_a_call():
    for path in PACKAGE.rglob("*.py"):
        if path.name == "machine.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"fcntl", "resource"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in MISSING, f"{path}:{node.lineno}"


def test_a_disk_that_cannot_allocate_gets_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        machine.allocate(fd, 1000)
        machine.allocate(fd, 10)
        assert os.fstat(fd).st_size == 1000
    finally:
        os.close(fd)


def test_reading_without_preadv_ends_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.preadv")
    (tmp_path / "file").write_bytes(b"abcdef")
    fd, buffer = os.open(tmp_path / "file", os.O_RDONLY), bytearray(4)
    try:
        assert machine.read_at(fd, memoryview(buffer), 4) == 2
        assert buffer == b"ef\0\0"
        assert machine.read_at(fd, memoryview(buffer), 6) == 0
    finally:
        os.close(fd)
