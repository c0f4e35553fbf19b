"""A fork server for all fault tests, and a checkpoint of many tasks with what an unbroken run makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from tests.builders import write_checkpoint
from tests.defaults import default_of_equalize
from tests.faults.server import Ask
from tests.interrupted import OPTIONS
from tests.snapshots import digests


@pytest.fixture(scope="session")
def ask(source: Path) -> Iterator[Ask]:
    """Sends a request to the server and returns its answer."""
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-m", "tests.faults.server", str(source)]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
    )

    def send(**request: Any) -> Any:
        assert server.stdin
        assert server.stdout
        values = {"options": OPTIONS} | {key: str(v) if isinstance(v, Path) else v for key, v in request.items()}
        server.stdin.write(json.dumps(values) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield send
    server.communicate(timeout=30)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 tasks in two files, with side files, one in a folder."""
    folder = write_checkpoint(tmp_path_factory.mktemp("faults") / "source", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling": true}')
    return folder


@pytest.fixture(scope="session")
def whole(source: Path) -> dict[str, str]:
    """sha256 of each file that an unbroken run writes, as users have it."""
    out = source.parent / "whole"
    with default_of_equalize(None):
        quantconvert.convert(source, out, **OPTIONS)
    return digests(out)


@pytest.fixture(scope="session")
def old(source: Path) -> Path:
    """An older result with other files, to be overwritten; copy it."""
    out = source.parent / "old"
    quantconvert.convert(source, out, scheme="W8A16", max_shard_size="100KB")
    (out / "generation_config.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    return out
