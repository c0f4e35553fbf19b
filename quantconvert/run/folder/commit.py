"""Moving a complete result into place, and taking that back.

The last file moved is config.json, without which no reader takes a folder for a checkpoint; with --overwrite the old
config.json goes first and the old weights after it, so that no reader ever sees a mixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from quantconvert.checkpoint.files import INDEX_NAME, STATE_FOLDER, is_stale
from quantconvert.errors import OutputError
from quantconvert.run.disk import fsync_folder, write_file
from quantconvert.run.folder.state import CONFIG, DONE, JOB, MOVES, OLD, Moves, State, read_moves, read_state


def commit(out: Path, built: Sequence[str]) -> None:
    """Move everything into place: old config and weights out, the files `built` in, config.json last.

    The moves are on disk before the first is made, so that `restore` can take back what a kill left half done; it does
    so here when a move fails. Raises `OutputError`.
    """
    hidden = out / STATE_FOLDER
    moves = _moves(out, built)
    _check_links(out, moves)
    try:
        write_file(hidden / MOVES, json.dumps(moves).encode())
        fsync_folder(hidden)
        for source, target in moves:
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            if target == CONFIG:
                fsync_folder(out)
            (out / source).replace(out / target)
            if source == CONFIG:
                fsync_folder(out)
        fsync_folder(out)
        (hidden / JOB).replace(hidden / DONE)
    except BaseException as error:
        restore(out)
        if isinstance(error, OSError):
            raise OutputError(f"cannot move the result into `{out}`: {error.strerror}") from error
        raise


def _moves(out: Path, built: Sequence[str]) -> Moves:
    new = sorted(built, key=lambda path: (path == CONFIG, path == INDEX_NAME, not path.endswith(".safetensors")))
    old = [path for path in file_paths(out) if path in new or is_stale(path)]
    old.sort(key=lambda path: path != CONFIG)
    moves = [(path, f"{STATE_FOLDER}/{OLD}/{path}") for path in old]
    return moves + [(f"{STATE_FOLDER}/{path}", path) for path in new]


def _check_links(out: Path, moves: Moves) -> None:
    """No file may be moved through a link to a folder elsewhere."""
    for folder in {parent for move in moves for path in move for parent in Path(path).parents if parent.parts}:
        if (out / folder).is_symlink():
            raise OutputError(f"`{out / folder}` is a link to another folder: expected one inside OUT")


def restore(out: Path) -> None:
    """Take back the moves of a commit that did not end, in reverse; one that fails is left for the next time."""
    failed = False
    for source, target in reversed(read_moves(out)):
        here, there = out / source, out / target
        if not os.path.lexists(here) and os.path.lexists(there):
            try:
                here.parent.mkdir(parents=True, exist_ok=True)
                there.replace(here)
            except OSError:
                failed = True
        _remove_empty(there.parent, out)
    if not failed and holds_old(out):
        with suppress(OSError):
            fsync_folder(out)
            (out / STATE_FOLDER / MOVES).unlink()


def holds_old(out: Path) -> bool:
    """Whether moves that could not be taken back may have left the user's own files in the hidden folder."""
    return (out / STATE_FOLDER / MOVES).exists() and read_state(out) is not State.DONE


def file_paths(folder: Path) -> list[str]:
    """Every file in `folder` except in hidden folders, sorted; links count as files, and are never followed."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(found)


def _remove_empty(folder: Path, out: Path) -> None:
    """Remove folders from `folder` up to `out`, `out` excluded, that hold nothing."""
    with suppress(OSError):
        while folder != out:
            folder.rmdir()
            folder = folder.parent
