"""`--shards K/N`: several processes make one result, in one folder or over the Hub, without an engine."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.run.staged import staging_folder
from tests.builders import llama_tensors, write_checkpoint
from tests.command import CLI, ENV
from tests.hub_files import SOURCE
from tests.hub_writes import REPO
from tests.loopback import loopback
from tests.snapshots import digests

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own uploads
]
ROOT = Path(__file__).parent.parent
CUT: dict[str, Any] = {"max_shard_size": "300KB", "equalize": True}
WORDS = ["--max-shard-size", "300KB", "--equalize", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors(hidden=512, intermediate=1024)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "in", tensors, shards=2)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    result = quantconvert.convert(source, out, **CUT)
    assert len(result.plan.shards) > 6
    return digests(out)


def test_parts_in_turn(source: Path, tmp_path: Path, expected: dict[str, str]):
    out = tmp_path / "out"
    for number in (3, 1, 2):
        result = quantconvert.convert(source, out, shards=f"{number}/3", **CUT)
        assert str(result.part) == f"{number}/3"
        assert not (out / "config.json").exists()
    events: list[Any] = []
    quantconvert.convert(source, out, report=events.append, verify=True, **CUT)
    assert digests(out) == expected
    assert any("by other processes" in str(event) for event in events)
    written = {path.name for path in out.iterdir()}
    assert not [name for name in written if name.startswith(".")]


def test_three_at_once_one_killed_and_repeated(source: Path, tmp_path: Path, expected: dict[str, str]):
    """And the first part twice at a time: the second is refused, or makes the same bytes."""
    out = tmp_path / "out"

    def start(part: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*CLI, str(source), str(out), "--shards", part, *WORDS], env=ENV)

    running = [start(f"{number}/3") for number in (1, 2, 3)]
    time.sleep(0.4)
    running[1].send_signal(signal.SIGKILL)
    assert [process.wait() for process in running][::2] == [0, 0]
    again = [start("2/3"), start("2/3")]
    codes = {process.wait() for process in again}
    assert 0 in codes
    assert codes <= {0, 5}
    quantconvert.convert(source, out, **CUT)
    assert digests(out) == expected


def test_what_is_missing_is_made(source: Path, tmp_path: Path, expected: dict[str, str]):
    """One part alone, one of its files torn: the command that finishes makes the rest, and that file again."""
    out = tmp_path / "out"
    quantconvert.convert(source, out, shards="1/2", **CUT)
    file = sorted(staging_folder(out).glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    quantconvert.convert(source, out, **CUT)
    assert digests(out) == expected


def test_overlapping_parts(source: Path, tmp_path: Path, expected: dict[str, str]):
    for part in ("1/2", "1/3", "2/2"):
        quantconvert.convert(source, tmp_path / "out", shards=part, **CUT)
    quantconvert.convert(source, tmp_path / "out", **CUT)
    assert digests(tmp_path / "out") == expected


def test_refusals(source: Path, tmp_path: Path):
    for text in ("0/2", "3/2", "x", "1"):
        with pytest.raises(quantconvert.UsageError, match="--shards"):
            quantconvert.convert(source, tmp_path / "out", shards=text, **CUT)
    quantconvert.convert(source, tmp_path / "out", shards="1/2", **CUT)
    with pytest.raises(quantconvert.OutputError, match="another conversion"):
        quantconvert.convert(source, tmp_path / "out", shards="2/2", bits=8, max_shard_size="300KB")
    with pytest.raises(quantconvert.OutputError, match="another conversion"):
        quantconvert.convert(source, tmp_path / "out", bits=8, max_shard_size="300KB")


def test_two_machines_over_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a common folder: each stages its files, a third command shows them."""
    with loopback(monkeypatch, source, tmp_path / "cache") as hub:
        for number in (1, 2):
            place = tmp_path / f"machine {number}"
            place.mkdir()
            monkeypatch.chdir(place)
            result = quantconvert.convert_to_hub(SOURCE, REPO, shards=f"{number}/2", **CUT)
            assert result.published is None
            assert "config.json" not in hub.content()
            assert not list(place.iterdir())
        last = quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
        assert last.published
        assert last.published.num_sent == 0
        assert len(hub.stored) == len(set(hub.stored))
        content = hub.content()
        quantconvert.convert(SOURCE, tmp_path / "out", stream=True, **CUT)
        assert all(content[path.name] == path.read_bytes() for path in (tmp_path / "out").iterdir())
    os.chdir(tmp_path)


def test_the_command_line(source: Path, tmp_path: Path):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*CLI, str(source), *words], env=ENV, capture_output=True, text=True, check=False)

    out = str(tmp_path / "out")
    part = run(out, "--shards", "1/2", *WORDS[:-1])
    assert part.returncode == 0
    assert "the same command without --shards" in part.stderr
    assert run(out, "--shards", "1/2", "--dry-run").returncode == 0
    both = run(out, "--shards", "1/2", "--push-to-hub", REPO)
    assert both.returncode == 2
    assert "goes without OUT" in both.stderr


def test_the_fleet(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the example: a small model as one task, a large one as its files, and all of it again."""
    spec = importlib.util.spec_from_file_location("fleet", ROOT / "examples" / "fleet" / "fleet.py")
    assert spec
    assert spec.loader
    fleet = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fleet", fleet)
    spec.loader.exec_module(fleet)
    monkeypatch.setattr(fleet, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(fleet, "LARGE_NBYTES", 6_000_000)
    large = tmp_path / "large"
    large.symlink_to(source)
    monkeypatch.setattr(fleet.quantconvert, "plan", lambda path: quantconvert.api.plan(path, max_shard_size="300KB"))
    convert = quantconvert.api.convert
    monkeypatch.setattr(fleet.quantconvert, "convert", lambda source, out, **how: convert(source, out, **(how | CUT)))
    for _ in range(2):
        fleet.main(tmp_path / "out", [str(large), str(ROOT / "examples" / "tiny-llama")])
        assert (tmp_path / "out" / "large" / "config.json").is_file()
        assert (tmp_path / "out" / "tiny-llama" / "config.json").is_file()
