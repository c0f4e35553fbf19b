"""The place to write to: what is refused, what somebody else does to it meanwhile, what it says on the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert import OutputError
from quantconvert.events import Event, Progress, ShardWritten
from tests.builders import write_checkpoint
from tests.test_writer import digests

STATE = ".quantconvert"
OPTIONS: dict[str, Any] = {"workers": 1, "max_shard_size": "60KB"}


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
