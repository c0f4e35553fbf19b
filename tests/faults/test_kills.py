"""Killed at any instant, a conversion continues: the same files in the end, nothing done twice, never a mixture."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.server import CALLS, WRITES, Ask
from tests.interrupted import STATE, journalled, visible
from tests.snapshots import digests

# How many calls of a kind are chosen, spread from the first to the last.
SPREAD = 4


def chosen(total: int) -> list[int]:
    """Up to `SPREAD` of the numbers 1 to `total`, both ends included."""
    return sorted({1 + (total - 1) * i // (SPREAD - 1) for i in range(SPREAD)})


def num_left(out: Path, after: dict[str, str]) -> int:
    """Tasks that an interrupted run left; none where only the hidden folder is to be removed, or what is left of it."""
    names = {path.name for path in (out / STATE).iterdir()} if (out / STATE).exists() else set()
    done = ".done.json" in names or (names <= {".lock"} and visible(out) == after)
    return 0 if done else 21 - journalled(out)


def kill_everywhere(ask: Ask, source: Path, whole: dict[str, str], folder: Path, old: Path | None, kind: str) -> int:
    """Kill at chosen calls of `kind`, continue, compare; returns how many instants there were."""
    before = visible(old) if old else {}
    after = whole | {name: value for name, value in before.items() if name == "notes.txt"}
    options = {"workers": 1, "max_shard_size": "60KB", "overwrite": old is not None}

    def fresh(name: str) -> Path:
        return shutil.copytree(old, folder / name) if old else folder / name

    total = ask(source=source, out=fresh("count"), options=options)["counts"].get(kind, 0)
    num_killed = 0
    for nth in chosen(total) if total else ():
        for at in ("before", "half", "after") if kind in WRITES else ("before", "after"):
            out = fresh(f"{kind}-{nth}-{at}")
            fault = {"kind": kind, "nth": nth, "at": at}
            assert ask(source=source, out=out, options=options, fault=fault) == {"killed": True}, fault
            num_killed += 1
            seen, left = visible(out), num_left(out, after)
            assert seen in (before, after) or "config.json" not in seen, fault
            if seen == after and not (out / STATE).exists():
                continue  # nothing was left to do
            answer = ask(source=source, out=out, options=options)
            assert (answer["error"], digests(out)) == (None, after), fault
            assert len(answer["carried"]) == left, fault
            assert not (out / STATE).exists(), fault
            shutil.rmtree(out)
    return num_killed


@pytest.mark.parametrize("kind", CALLS)
def test_killed_around_each_kind_of_call(ask: Ask, source: Path, whole: dict[str, str], tmp_path: Path, kind: str):
    """Three quarters of a hundred instants over all kinds; a kind that is never called would prove nothing."""
    assert kill_everywhere(ask, source, whole, tmp_path, None, kind) >= 2


@pytest.mark.parametrize("kind", ["replace", "unlink", "rmdir", "fsync"])
def test_killed_while_an_old_checkpoint_is_replaced(
    ask: Ask, source: Path, whole: dict[str, str], old: Path, tmp_path: Path, kind: str
):
    assert kill_everywhere(ask, source, whole, tmp_path, old, kind) >= 8


def test_killed_again_and_again_at_random_until_it_completes(
    ask: Ask, source: Path, whole: dict[str, str], tmp_path: Path
):
    """Each run gets a random while longer than the last that did not get through, and does its own tasks only."""
    chance, out, num_killed = random.Random(7), tmp_path / "out", 0
    while num_killed < 200:
        num_done, left = journalled(out), num_left(out, whole)
        seconds = chance.uniform(0.01, 0.08) + 0.004 * num_killed
        answer = ask(source=source, out=out, fault={"seconds": seconds})
        if not answer["killed"]:
            break
        assert journalled(out) >= num_done or whole == visible(out)
        num_killed += 1
    assert num_killed >= 3
    assert digests(out) == whole
    if answer["error"]:  # the one before was killed when it had removed even the hidden folder
        assert "exists and is not empty" in answer["error"]
    else:
        assert len(answer["carried"]) == left
