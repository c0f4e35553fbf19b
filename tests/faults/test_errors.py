"""A disk that fails: the message names what failed, what is done is kept, and the same call completes the files."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

import quantconvert
from tests.faults.server import Ask
from tests.interrupted import OPTIONS, STATE, journalled, visible
from tests.snapshots import digests

FAILING = ("pwrite", "posix_fallocate", "fdatasync", "fsync", "replace", "open", "mkdir")


@pytest.mark.parametrize(("number", "lasting"), [(errno.EIO, False), (errno.ENOSPC, True)], ids=["once", "lasting"])
@pytest.mark.parametrize("kind", FAILING)
def test_continues_after_a_failing_call(
    ask: Ask, source: Path, whole: dict[str, str], tmp_path: Path, kind: str, number: int, lasting: bool
):
    total = ask(source=source, out=tmp_path / "count")["counts"][kind]
    # the first write is a process id, for the message to another; most folders to be made exist
    first = 2 if kind == "pwrite" else 1
    for nth in sorted({first, total // 2, total}) if kind != "mkdir" else (1,):
        out = tmp_path / str(nth)
        fault = {"kind": kind, "nth": nth, "at": "error", "errno": number, "lasting": lasting}
        answer = ask(source=source, out=out, fault=fault)
        assert not answer.get("crashed"), answer
        assert os.strerror(number) in answer["error"], fault
        if kind == "replace" and lasting:  # moves that cannot even be taken back
            assert "config.json" not in visible(out) or visible(out) == whole
        else:
            assert visible(out) == {}, fault
        kept = [f"{journalled(out)} of 21 tasks are done and kept"] if journalled(out) else []
        assert [note.split(":")[0] for note in answer["notes"]] == kept
        assert kept or not out.exists()
        answer = ask(source=source, out=out)
        assert (answer["error"], digests(out)) == (None, whole)


def test_a_task_whose_sync_failed_is_not_journalled(ask: Ask, source: Path, tmp_path: Path):
    """The system reports a lost write once: whatever is synced after that says nothing."""
    out = tmp_path / "out"
    fault = {"kind": "fdatasync", "nth": 12, "at": "error", "errno": errno.EIO, "lasting": False}
    answer = ask(source=source, out=out, fault=fault)
    assert 0 < journalled(out) < len(answer["carried"])


def test_short_writes(ask: Ask, source: Path, whole: dict[str, str], tmp_path: Path):
    """Every write, copy and allocation does half of what it is asked to."""
    answer = ask(source=source, out=tmp_path / "out", fault={"at": "short"})
    assert (answer["error"], digests(tmp_path / "out")) == (None, whole)


@pytest.mark.usefixtures("auto_equalize")
def test_a_disk_that_is_really_full(source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch):
    """On a small file system; the check beforehand is what would refuse, so it is told that there is room.

    1 MB and a little of it is the room that is kept for the small files.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1180k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr("quantconvert.run.folder.preflight.free_nbytes", lambda out: 1 << 40)
        monkeypatch.setattr("quantconvert.run.ledger.FLUSH_NBYTES", 0)
        with pytest.raises(quantconvert.OutputError, match="No space left on device") as caught:
            quantconvert.convert(source, disk / "out", **OPTIONS)
        assert "tasks are done and kept" in caught.value.__notes__[0]
        subprocess.run(["mount", "-o", "remount,size=3m", str(disk)], check=True)
        quantconvert.convert(source, disk / "out", **OPTIONS)
        assert digests(disk / "out") == whole
        assert not (disk / "out" / STATE).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_soak(ask: Ask, source: Path, tmp_path: Path):
    """200 conversions in one process: what it holds does not grow."""
    (tmp_path / "out").mkdir()
    found = ask(source=source, out=tmp_path / "out", soak=200)
    early, late = found[40], found[-1]
    assert len(found) == 200
    assert (late["fds"], late["threads"]) == (early["fds"], early["threads"])
    assert late["rss"] - early["rss"] < 8_000_000
