"""`--shards K/N`: several processes make one result, in one folder or over the Hub, without an engine."""

from __future__ import annotations

import importlib.util
import json
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
from quantconvert.events import Progress
from quantconvert.run.asked import Asked, read_asked
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


def test_finish_knows_what_was_asked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the folder alone, wherever the user stands, with options of every kind; it makes what is missing."""
    asked: dict[str, Any] = CUT | {
        "rules": ["*.o_proj=W8A16"], "ignore": ["*.0.mlp.down_proj"], "base_model": "me/base", "target_bits": 5.5,
    }  # fmt: skip
    quantconvert.convert(source, tmp_path / "expected", **asked)
    monkeypatch.chdir(source.parent)
    quantconvert.convert(source.name, tmp_path / "out", shards="2/3", workers=1, **asked)
    monkeypatch.chdir(tmp_path)
    events: list[Any] = []
    result = quantconvert.finish("out", report=events.append, verify=True)
    assert result.verification
    assert result.verification.is_ok
    assert result.plan.job.workers == 0
    count = len(result.plan.shards)
    made = len(range(1, count, 3))
    said = f"{made} shards by other processes; {count - made} of {count} are missing, and made now"
    assert any(said in str(event) for event in events)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert not staging_folder(tmp_path / "out").exists()


def test_finish_goes_on_where_it_was_stopped(source: Path, tmp_path: Path, expected: dict[str, str]):
    out, seen = tmp_path / "out", list[object]()

    def stop(event: object) -> None:
        seen.append(event)
        if sum(isinstance(event, Progress) for event in seen) > 8:
            raise KeyboardInterrupt

    quantconvert.convert(source, out, shards="1/2", **CUT)
    with pytest.raises(KeyboardInterrupt):
        quantconvert.finish(out, report=stop)
    quantconvert.finish(out)
    assert digests(out) == expected


def test_finish_refuses(source: Path, tmp_path: Path):
    """Where no part is; where one is of another source by now; what cannot be read."""
    out = tmp_path / "out"
    with pytest.raises(quantconvert.OutputError, match="nothing to finish: no part of") as caught:
        quantconvert.finish(out)
    assert "--shards K/N makes a part" in str(caught.value.hint)
    assert not out.exists()
    changing = write_checkpoint(tmp_path / "in")
    quantconvert.convert(changing, out, shards="1/2", group_size=64)
    write_checkpoint(changing, llama_tensors(intermediate=512))
    with pytest.raises(quantconvert.OutputError, match="shards of another conversion"):
        quantconvert.finish(out)
    (staging_folder(out) / "asked.json").write_text("[")
    with pytest.raises(quantconvert.OutputError, match="cannot read"):
        quantconvert.finish(out)


def test_finish_from_the_hub_takes_the_commit_of_the_parts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with loopback(monkeypatch, source, tmp_path / "cache"):
        result = quantconvert.convert(SOURCE, tmp_path / "out", shards="1/2", **CUT)
        assert read_asked(staging_folder(tmp_path / "out"), tmp_path / "out") == Asked(
            SOURCE, {"max_shard_size": 300_000, "equalize": True, "revision": result.plan.checkpoint.revision}
        )
        quantconvert.finish(tmp_path / "out")
        quantconvert.convert(SOURCE, tmp_path / "expected", **CUT)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


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
    done = subprocess.run([*CLI, "finish", out, "--json"], env=ENV, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["out"] == out
    again = subprocess.run([*CLI, "finish", out], env=ENV, capture_output=True, text=True)
    assert again.returncode == 5
    assert "nothing to finish" in again.stderr
    assert "--shards K/N" in again.stderr
    both = run(f"{out}-2", "--shards", "1/2", "--push-to-hub", REPO)
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
