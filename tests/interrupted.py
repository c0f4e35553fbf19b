"""Conversions that are stopped on their way, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.events import Event, Progress
from tests.snapshots import digests

STATE = ".quantconvert"
# Several output shards, one worker: the order of calls is the same in every run.
OPTIONS: dict[str, Any] = {"workers": 1, "max_shard_size": "60KB"}


def interrupt(source: Path, out: Path, after: int = 9, **options: Any) -> int:
    """Stop a conversion after `after` tensors; returns how many tasks it has journalled."""
    names = set()

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            names.add(event.name)
            if len(names) > after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quantconvert.convert(source, out, report=report, **(OPTIONS | options))
    number = int(caught.value.__notes__[0].split()[0])
    assert caught.value.__notes__ == [
        f"{number} of 21 tasks are done and kept: the same command continues, --restart starts over"
    ]
    assert number == after
    return number


def visible(out: Path) -> dict[str, str]:
    """The files that a reader of `out` sees, without the hidden folder."""
    return {name: value for name, value in digests(out).items() if not name.startswith(STATE)} if out.is_dir() else {}


def journalled(out: Path) -> int:
    """How many tasks the interrupted run in `out` has journalled."""
    path = out / STATE / ".journal"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return len({json.loads(line)["task"] for line in lines if line.endswith(b"\n")})
