"""`kill -9` at requests of a conversion from Hub to Hub, and the same command again: in the same folder, and elsewhere.

Every request with `QUANTCONVERT_EVERY_REQUEST=1`, else a dozen of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import llama_tensors, write_checkpoint
from tests.hub_files import SOURCE
from tests.hub_writes import REPO, TOKEN, State, serve_writes
from tests.snapshots import digests

WORDS = ("convert", SOURCE, "--push-to-hub", REPO, "--max-shard-size", "200KB", "--verify", "--quiet")
SAMPLES = 12


def start(endpoint: str, work: Path) -> subprocess.Popen[str]:
    work.mkdir(exist_ok=True)
    env = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1", "QUANTCONVERT_STAGE_SECONDS": "0.01",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    command = [sys.executable, "-m", "quantconvert", *WORDS]
    return subprocess.Popen(command, cwd=work, env=env, text=True, stderr=subprocess.PIPE)


def finish(endpoint: str, work: Path) -> None:
    process = start(endpoint, work)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert TOKEN not in said
    assert not list(work.glob(".quantconvert-*"))


def content(state: State, folder: Path) -> dict[str, str]:
    for path, data in state.content().items():
        folder.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return digests(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors(hidden=256, intermediate=512)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "in", tensors, shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """What an undisturbed run shows, and its number of requests."""
    work = tmp_path_factory.mktemp("whole")
    with serve_writes(source) as (endpoint, state):
        finish(endpoint, work)
        return content(state, work / "shown"), len(state.log)


def moments(count: int) -> list[int]:
    if os.environ.get("QUANTCONVERT_EVERY_REQUEST"):
        return list(range(1, count))
    return sorted({1 + i * (count - 2) // (SAMPLES - 1) for i in range(SAMPLES)})


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same folder", "elsewhere"])
def test_killed_and_continued(source: Path, tmp_path: Path, whole: tuple[dict[str, str], int], elsewhere: bool):
    expected, count = whole
    for moment in moments(count):
        with serve_writes(source) as (endpoint, state):
            state.stop_after = moment
            process = start(endpoint, tmp_path / f"{moment}")
            begun = time.monotonic()
            while not state.hanging.wait(0.05) and process.poll() is None:
                assert time.monotonic() - begun < 600  # it hangs
            process.kill()
            process.communicate()
            state.stop_after = None
            seen = set(state.branches.get("main", ()))
            assert "config.json" not in seen or expected.keys() <= seen
            finish(endpoint, tmp_path / (f"{moment}-again" if elsewhere else f"{moment}"))
            assert content(state, tmp_path / f"{moment}-shown") == expected, moment
            assert set(state.branches) == {"main"}
            assert len(state.stored) == len(set(state.stored)), moment
            assert state.tokens_elsewhere == 0
