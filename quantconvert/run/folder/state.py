"""Where a conversion into an output folder stands, read from the disk alone.

               resume                 commit                 its last move
    EMPTY ---------------> BUILDING ---------> COMMITTING -----------------> DONE
      ^                      |  ^                  |                          |
      |        abandon       |  |     restore      |                          |
      +----------------------+  +------------------+                          |
      +------------------------------- clear --------------------------------+

Everything is built in one hidden folder inside OUT, whose own files have names that begin with a dot, which no file of
a checkpoint does: `.job.json` says which conversion this is, `.journal` which tasks are done, `.reserve` keeps room for
the small files, `.order.json` speaks to processes elsewhere, `.moves.json` lists the moves of a commit before the first
is made, and `.job.json` becomes `.done.json` after the last. The clean-up removes the lock and the proof last; a kill
there leaves either, or nothing.
"""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

from quantconvert.checkpoint.files import STATE_FOLDER
from quantconvert.factors import IMPORTANCES

CONFIG, REPORT = "config.json", "quantconvert.json"
JOB, DONE, MOVES, JOURNAL, LOCK, RESERVE, ORDER = (
    ".job.json", ".done.json", ".moves.json", ".journal", ".lock", ".reserve", ".order.json",
)  # fmt: skip
OLD = ".old"
OURS = {JOB, DONE, MOVES, JOURNAL, LOCK, RESERVE, ORDER, IMPORTANCES}

# What is moved and where to, relative to OUT.
Moves = list[tuple[str, str]]


class State(Enum):
    """EMPTY: nothing of a conversion, whatever else OUT may hold. BUILDING: not complete, nothing visible yet.
    COMMITTING: files are being moved into place; until this is taken back OUT is no checkpoint.
    DONE: every file is in place, and at most the hidden folder is left to remove.
    """

    EMPTY = "empty"
    BUILDING = "building"
    COMMITTING = "committing"
    DONE = "done"


def read_state(out: Path) -> State:
    """Where the conversion into `out` stands. Reads a few names and the list of moves; nothing is changed."""
    hidden = out / STATE_FOLDER
    if not hidden.is_dir() or hidden.is_symlink():
        return State.EMPTY
    if (hidden / DONE).exists():
        return State.DONE
    if read_moves(out):
        return State.COMMITTING
    if {path.name for path in hidden.iterdir()} - {LOCK}:
        return State.BUILDING
    # Begun a moment ago beside what is none of ours, or killed in the last steps of the clean-up.
    return State.DONE if (out / CONFIG).is_file() and (out / REPORT).is_file() else State.EMPTY


def read_proof(out: Path) -> dict[str, Any] | None:
    """Which conversion has ended in `out`; None where none has, or where only that is gone."""
    return read_object(out / STATE_FOLDER / DONE)


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object of ours; None where there is none, or only a part of it."""
    try:
        value = json.loads(read_own(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_moves(out: Path) -> Moves:
    """The moves of a commit that did not end; none where even their list is torn, for then none was made."""
    if (out / STATE_FOLDER / DONE).exists():
        return []
    try:
        moves = [(str(source), str(target)) for source, target in json.loads(read_own(out / STATE_FOLDER / MOVES))]
    except (OSError, ValueError, TypeError):
        return []
    return moves if all(map(_is_ours, moves)) else []


def read_own(path: Path) -> bytes:
    """A file of ours, which is no link."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        return file.read()


def _is_ours(move: tuple[str, str]) -> bool:
    """Whether a move is one that `commit` makes: inside the folder, between it and the hidden one."""
    paths = [Path(path) for path in move]
    inside = all(not path.is_absolute() and path.parts and ".." not in path.parts for path in paths)
    return inside and any(path.parts[0] == STATE_FOLDER for path in paths)


def visible_names(out: Path) -> list[str]:
    """What the user sees in `out`, as it will be once a commit that a kill left half done is taken back."""
    moves, changed = read_moves(out), dict[str, bool]()

    def exists(path: str) -> bool:
        return changed.get(path, (out / path).exists())

    for source, target in reversed(moves):
        if not exists(source) and exists(target):
            changed[source], changed[target] = True, False
    leaving = {out / path for path, there in changed.items() if not there}
    names = {path.split("/")[0] for path, there in changed.items() if there}
    folders = {target.split("/")[0] for _, target in moves}  # a kill may leave one empty
    for path in out.iterdir():
        files = [p for p in path.rglob("*") if not p.is_dir()] if path.is_dir() else [path]
        if not leaving.issuperset(files) or (not files and path.name not in folders):
            names.add(path.name)
    return sorted(names - {STATE_FOLDER})
