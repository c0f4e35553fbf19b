"""The place to write to: what is refused, what somebody else does to it meanwhile, what it says on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import quantconvert
from quantconvert import OutputError
from quantconvert.checkpoint.contents import Download
from quantconvert.events import Event, Note, Progress, ShardWritten
from quantconvert.run.folder import OutputFolder, State, check_disk, read_state
from tests.builders import write_checkpoint
from tests.interrupted import OPTIONS, STATE
from tests.snapshots import digests


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def remove(out: Path) -> None:
    shutil.rmtree(out)


def rename(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def remove_hidden(out: Path) -> None:
    shutil.rmtree(out / STATE)


def replace_hidden(out: Path) -> None:
    (out / STATE).rename(out / ".other")
    (out / STATE).mkdir()


MOMENTS: list[Callable[[Event], bool]] = [
    lambda event: isinstance(event, Progress),
    lambda event: isinstance(event, ShardWritten) and event.file.startswith("model-00002"),
    lambda event: isinstance(event, ShardWritten) and event.file.startswith("model-00004"),
]


@pytest.mark.parametrize("harm", [remove, rename, remove_hidden, replace_hidden])
@pytest.mark.parametrize("moment", MOMENTS, ids=["first tensor", "second file", "last file"])
def test_out_that_is_taken_away_while_it_is_written(
    source: Path, out: Path, harm: Callable[[Path], None], moment: Callable[[Event], bool]
):
    """One message, no traceback of our own; never a result that lacks what was written before; then all is well."""
    harmed: list[Event] = []

    def report(event: Event) -> None:
        if not harmed and moment(event):
            harmed.append(event)
            harm(out)

    with pytest.raises(OutputError) as caught:
        quantconvert.convert(source, out, report=report, **OPTIONS)
    assert harmed
    assert caught.value.__context__ is None or isinstance(caught.value.__context__, OSError)
    assert not (out / "config.json").exists()
    shutil.rmtree(out / ".other", ignore_errors=True)
    quantconvert.convert(source, out, **OPTIONS)
    quantconvert.convert(source, out.with_name("whole"), **OPTIONS)
    assert digests(out) == digests(out.with_name("whole"))


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 22)], ids=["name", "path"])
def test_an_output_with_a_name_that_is_too_long(source: Path, tmp_path: Path, name: str):
    for call in (quantconvert.plan, quantconvert.convert):
        with pytest.raises(OutputError) as caught:
            call(source, tmp_path / name)
        assert caught.value.message == f"cannot use output `{tmp_path / name}`: File name too long"
        assert caught.value.hint == "choose another folder"


def test_a_source_with_a_name_that_is_too_long(out: Path):
    with pytest.raises(quantconvert.CheckpointError, match="does not exist"):
        quantconvert.convert("./" + "x" * 300, out)


def test_an_output_that_is_a_link_to_nothing(source: Path, out: Path, tmp_path: Path):
    out.symlink_to(tmp_path / "gone")
    for call in (quantconvert.plan, quantconvert.convert):
        with pytest.raises(OutputError) as caught:
            call(source, out)
        assert caught.value.message == f"output `{out}` is a link that leads nowhere, to `{tmp_path / 'gone'}`"
        assert caught.value.hint == "create that folder, or remove the link"
    (tmp_path / "gone").mkdir()
    quantconvert.convert(source, out)
    assert (tmp_path / "gone" / "config.json").exists()


@pytest.mark.process
def test_a_read_only_file_system_is_named_and_nothing_else(source: Path, tmp_path: Path):
    """As root, which may write everywhere else. The disk is full too, as read-only ones are."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError) as caught:
            quantconvert.plan(source, disk / "out")
        assert str(caught.value) == f"cannot write in `{disk}`: read-only file system"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_room_for_the_small_files_is_kept(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process fills the disk while tensors are written: every later write needs what was set aside."""
    (source / "tokenizer.json").write_bytes(b" " * 300_000)
    kept: list[int] = []

    def report(event: Event) -> None:
        if isinstance(event, ShardWritten):
            kept.append((out / STATE / ".reserve").stat().st_blocks * 512)

    used: list[list[str]] = []
    use = OutputFolder.use_reserve

    def spied(folder: OutputFolder) -> None:
        used.append([path.name for path in folder.state.iterdir() if not path.name.startswith((".", "model-"))])
        use(folder)
        assert not (folder.state / ".reserve").exists()

    monkeypatch.setattr(OutputFolder, "use_reserve", spied)
    quantconvert.convert(source, out, report=report, **OPTIONS)
    assert len(kept) == 4
    assert min(kept) >= 1_300_000
    assert used == [[]]
    assert not (out / STATE).exists()


def test_a_disk_without_room_for_the_small_files_is_refused_before_the_first_tensor(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    allocate = os.posix_fallocate

    def refuse(fd: int, offset: int, nbytes: int) -> None:
        if nbytes > 900_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, nbytes)

    monkeypatch.setattr("os.posix_fallocate", refuse)
    seen: list[Event] = []
    with pytest.raises(OutputError, match="No space left on device"):
        quantconvert.convert(source, out, report=seen.append, **OPTIONS)
    assert not [event for event in seen if not isinstance(event, Note)]
    assert not out.exists()


def test_states(source: Path, out: Path):
    """Each as a kill would leave it, and what takes it to the next."""
    assert read_state(out) is State.EMPTY
    seen: list[State] = []

    def report(event: Event) -> None:
        if isinstance(event, ShardWritten):
            seen.append(read_state(out))

    replace, clear = Path.replace, OutputFolder.clear

    def moved(path: Path, target: Path) -> Path:
        if path.parent == out / STATE and target.parent == out:
            seen.append(read_state(out))
        return replace(path, target)

    def kept(folder: OutputFolder) -> None:
        seen.append(read_state(out))
        clear(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", moved)
        patch.setattr(OutputFolder, "clear", kept)
        quantconvert.convert(source, out, report=report)
    assert seen == [State.BUILDING, *[State.COMMITTING] * 6, State.DONE]
    assert read_state(out) is State.EMPTY
    (out / STATE).mkdir()
    (out / STATE / ".lock").touch()
    assert read_state(out) is State.DONE
    (out / STATE / ".journal").touch()
    assert read_state(out) is State.BUILDING


def test_the_download_into_the_hubs_cache_counts(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the same disk both must fit; on another each on its own."""
    cache = tmp_path / "cache"
    free = {out: 1000, cache: 1000}
    monkeypatch.setattr("quantconvert.run.folder.preflight.free_nbytes", lambda path: free[path])
    assert check_disk(out, 400, Download(cache, 600)) == []
    assert check_disk(out, 1000, Download(cache, 0)) == []
    (error,) = check_disk(out, 400, Download(cache, 601))
    assert error.message == (
        f"disk of `{out}` is too small: the result and the download into `{cache}` need 1001 bytes, 1000 are free"
    )
    hint = "free some space, or choose a folder on another disk; HF_HOME says where downloads go"
    assert error.hint == hint
    monkeypatch.setattr("quantconvert.run.folder.preflight._disk_of", str)
    assert check_disk(out, 1000, Download(cache, 1000)) == []
    both = check_disk(out, 1001, Download(cache, 1001))
    assert [error.message for error in both] == [
        f"disk of `{out}` is too small: the result needs 1001 bytes, 1000 are free",
        f"disk of `{cache}` is too small: the download of the source needs 1001 bytes, 1000 are free",
    ]
