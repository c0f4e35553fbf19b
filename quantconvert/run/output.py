"""The output folder: everything is built in one hidden folder inside it and moved into place when all is complete.

The last file moved is config.json, without which no reader takes a folder for a checkpoint; with --overwrite the old
config.json goes first and the old weights after it, so that no reader ever sees a mixture. The hidden folder also holds
what a later run needs to continue; those names begin with a dot, which no file of a checkpoint does.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantconvert.checkpoint.files import INDEX_NAME, STATE_FOLDER, is_stale
from quantconvert.errors import OutputError, QuantConvertError
from quantconvert.events import Note, Reporter
from quantconvert.planning import Plan
from quantconvert.run.disk import copy_file, fsync_folder, write_file
from quantconvert.run.journal import Journal, differences, identity, is_blank
from quantconvert.run.lock import Lock, probe

CONFIG = "config.json"
# Which conversion this is, and the same file's name once every move is made; the moves of a commit; finished tasks.
JOB, DONE, MOVES, JOURNAL, LOCK = ".job.json", ".done.json", ".moves.json", ".journal", ".lock"
OLD = ".old"
_OURS = {JOB, DONE, MOVES, JOURNAL, LOCK}
RESTART_HINT = "--restart starts over, or give the source and options of before"


def _paths(folder: Path) -> list[str]:
    """Every file in `folder` except in hidden folders, sorted; links count as files, and are never followed."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(found)


def check_output(out: Path, source: Path | None, overwrite: bool) -> list[QuantConvertError]:
    """Refusals about the place to write to: not a folder, not empty, inside the source, not writable."""
    errors: list[QuantConvertError] = []
    resolved = out.resolve()
    if source is not None and resolved != source.resolve() and resolved.is_relative_to(source.resolve()):
        errors.append(OutputError(f"output `{out}` is inside the source `{source}`", hint="choose a folder beside it"))
    if source is not None and source.resolve().is_relative_to(resolved):
        what = "is the source itself" if resolved == source.resolve() else f"contains the source `{source}`"
        errors.append(OutputError(f"output `{out}` {what}", hint="choose a folder beside it"))
    elif out.exists() and not out.is_dir():
        errors.append(OutputError(f"output `{out}` exists and is not a folder"))
    elif out.is_dir():
        found = _names_in(out)
        if found and not overwrite and not (out / STATE_FOLDER / DONE).exists():
            names = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
            errors.append(
                OutputError(
                    f"output `{out}` exists and is not empty: it holds {names}",
                    hint="--overwrite replaces a checkpoint once the new one is complete; or choose another folder",
                )
            )
        elif found and CONFIG not in found:
            errors.append(
                OutputError(f"output `{out}` is not empty and no checkpoint: --overwrite replaces only those")
            )
    parent = existing_parent(out)
    blocked = next((path for path in resolved.parents if path.exists() and not path.is_dir()), None)
    if blocked:
        errors.append(OutputError(f"output `{out}` is inside `{blocked}`, which is not a folder"))
    elif not os.access(parent, os.W_OK):
        errors.append(OutputError(f"cannot write in `{parent}`: permission denied"))
    return errors


def check_unlocked(out: Path) -> None:
    """Refuse at once, before anything is read, where another process writes into `out`."""
    probe(out / STATE_FOLDER / LOCK)


def existing_parent(out: Path) -> Path:
    """The nearest folder on the way up that exists: its file system is where the output will be."""
    path = out.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def free_nbytes(out: Path) -> int:
    """Free bytes where `out` is or will be."""
    return shutil.disk_usage(existing_parent(out)).free


def check_disk(out: Path, needed: int) -> list[QuantConvertError]:
    """The refusal when the result cannot fit (what an interrupted run left is counted as free)."""
    state = out / STATE_FOLDER
    left = [path for path in state.rglob("*") if OLD not in path.parts] if state.is_dir() else []
    left += [out / target for source, target in _read_moves(out) if source.startswith(STATE_FOLDER)]
    free = free_nbytes(out) + sum(path.stat().st_size for path in left if path.is_file())
    if needed <= free or (state / DONE).exists():
        return []
    hint = "free some space, or choose a folder on another disk"
    return [OutputError(f"disk of `{out}` is too small: the result needs {needed} bytes, {free} are free", hint=hint)]


class OutputFolder:
    """`out`, and the hidden folder in it where a conversion builds its files. One process at a time has it."""

    def __init__(self, out: Path, report: Reporter) -> None:
        self.out, self.report = out, report
        self.state = out / STATE_FOLDER
        self._made = [p for p in (self.state, out, *out.parents) if not p.exists()]
        self._lock = Lock(self.state / LOCK)

    def acquire(self) -> None:
        """Lock the hidden folder, made where there is none, and take back the moves that a kill left half done."""
        if self.state.is_symlink():
            raise OutputError(f"`{self.state}` is a link: expected a folder of our own", hint="remove it")
        try:
            if not self._lock.acquire():
                self._note(f"the file system of `{self.out}` has no locks: start no second conversion into it")
            self.restore()
        except OSError as error:
            raise OutputError(f"cannot create `{self.state}`: {error.strerror}") from error
        if self._holds_old:
            raise OutputError(f"`{self.state}` holds the checkpoint that an interrupted --overwrite moved away")

    @property
    def _holds_old(self) -> bool:
        """Whether moves that could not be taken back have left the user's own files in the hidden folder."""
        return (self.state / MOVES).exists() and not (self.state / DONE).exists()

    def release(self) -> None:
        """Let another process have it; where nothing was begun, nothing stays behind."""
        with suppress(OSError):
            begun = {LOCK, JOB, JOURNAL} if self._lock.held and is_blank(self.state / JOURNAL) else set()
            if {path.name for path in self.state.iterdir()} <= begun:
                self.clear()
        self._lock.release()

    def is_done(self, plan: Plan) -> bool:
        """Whether a run of this very plan ended after its last move: then only the hidden folder is left to remove."""
        old = self._read(DONE)
        if old is None:
            return False
        same = not differences(old, identity(plan))
        if same:
            self.clear()
        else:
            self._clear_state()
            (self.state / DONE).unlink()
        return same

    def resume(self, plan: Plan, restart: bool) -> Journal:
        """The journal of the interrupted run that the hidden folder holds, or an empty one.

        Raises `OutputError` when that run was of another conversion, unless `restart` discards it.
        """
        new, old = identity(plan), self._read(JOB)
        try:
            if old is None or restart:
                if self._clear_state() and not restart:
                    self._note(f"`{self.state}` holds nothing that can be continued: starting over")
            elif found := differences(old, new):
                if not is_blank(self.state / JOURNAL):
                    what = "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
                    text = f"output `{self.out}` holds an interrupted conversion of another kind: {what}"
                    raise OutputError(text, hint=RESTART_HINT)
                self._clear_state()
            if not (self.state / JOB).exists():
                write_file(self.state / JOB, json.dumps(new, indent=1).encode())
                fsync_folder(self.state)
        except OSError as error:
            raise OutputError(f"cannot write in `{self.state}`: {error.strerror}") from error
        journal = Journal(self.state / JOURNAL, plan)
        if journal.done:
            self._note(f"continuing: {len(journal.done)} of {len(plan.tasks)} tasks are done")
        return journal

    def _note(self, text: str) -> None:
        self.report(Note("resume", text))

    def _read(self, name: str) -> dict[str, Any] | None:
        """What the interrupted run was; None where there was none, or where it wrote that down only in part."""
        try:
            value = json.loads(_read_own(self.state / name))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, path: str, content: bytes) -> None:
        """A complete, synced file in the hidden folder."""
        try:
            (self.state / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.state / path, content)
        except OSError as error:
            raise OutputError(f"cannot write `{path}`: {error.strerror}") from error

    def copy(self, source: Path, path: str) -> None:
        """A file of the source repository, content only, into the hidden folder."""
        try:
            (self.state / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / path, self.state / path)
        except OSError as error:
            raise OutputError(f"cannot copy `{path}`: {error.strerror}") from error

    @property
    def files(self) -> tuple[str, ...]:
        """What has been built so far, by path in the checkpoint."""
        return tuple(path for path in _paths(self.state) if path not in _OURS)

    def commit(self) -> None:
        """Move everything into place: old config and weights out, weights in, other files, config.json last.

        The moves are on disk before the first is made, so that `restore` can take back what a kill left half done.
        """
        new = list(self.files)
        new.sort(key=lambda path: (path == CONFIG, path == INDEX_NAME, not path.endswith(".safetensors")))
        old = [path for path in _paths(self.out) if path in new or is_stale(path)]
        old.sort(key=lambda path: path != CONFIG)
        moves = [(path, f"{STATE_FOLDER}/{OLD}/{path}") for path in old]
        moves += [(f"{STATE_FOLDER}/{path}", path) for path in new]
        self._check_links(moves)
        self.write(MOVES, json.dumps(moves).encode())
        try:
            fsync_folder(self.state)
            for source, target in moves:
                (self.out / target).parent.mkdir(parents=True, exist_ok=True)
                if target == CONFIG:
                    fsync_folder(self.out)
                (self.out / source).replace(self.out / target)
                if source == CONFIG:
                    fsync_folder(self.out)
            fsync_folder(self.out)
            (self.state / JOB).replace(self.state / DONE)
        except BaseException as error:
            self.restore()
            if isinstance(error, OSError):
                raise OutputError(f"cannot move the result into `{self.out}`: {error.strerror}") from error
            raise
        with suppress(OSError):
            self.clear()

    def _check_links(self, moves: list[tuple[str, str]]) -> None:
        """No file may be moved through a link to a folder elsewhere."""
        for folder in {parent for move in moves for path in move for parent in Path(path).parents if parent.parts}:
            if (self.out / folder).is_symlink():
                raise OutputError(f"`{self.out / folder}` is a link to another folder: expected one inside OUT")

    def restore(self) -> None:
        """Take back the moves of a commit that did not end, in reverse; one that fails is left for the next time."""
        failed = False
        for source, target in reversed(_read_moves(self.out)):
            here, there = self.out / source, self.out / target
            if not os.path.lexists(here) and os.path.lexists(there):
                try:
                    here.parent.mkdir(parents=True, exist_ok=True)
                    there.replace(here)
                except OSError:
                    failed = True
            _remove_empty(there.parent, self.out)
        if not failed and self._holds_old:
            with suppress(OSError):
                fsync_folder(self.out)
                (self.state / MOVES).unlink()

    def abandon(self) -> None:
        """Remove what this run built, and the folders it created; not while an old checkpoint is in there."""
        if not self._holds_old:
            self.clear()

    def clear(self) -> None:
        """Remove the hidden folder, the proof that a commit has ended and the lock last; then folders that we made."""
        self._clear_state()
        for name in (DONE, LOCK):
            (self.state / name).unlink(missing_ok=True)
        for folder in (self.state, *(folder for folder in self._made if folder != self.state)):
            try:
                folder.rmdir()
            except OSError:
                return

    def _clear_state(self) -> bool:
        """Remove everything from the hidden folder but the lock and the proof; False where there was nothing."""
        found = [path for path in self.state.iterdir() if path.name not in (LOCK, DONE)]
        for path in sorted(found, key=lambda path: path.name == JOB):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return bool(found)


def _read_moves(out: Path) -> list[tuple[str, str]]:
    """The moves of a commit that did not end; none where even their list is torn, for then none was made."""
    if (out / STATE_FOLDER / DONE).exists():
        return []
    try:
        moves = [(str(source), str(target)) for source, target in json.loads(_read_own(out / STATE_FOLDER / MOVES))]
    except (OSError, ValueError, TypeError):
        return []
    return moves if all(map(_is_ours, moves)) else []


def _read_own(path: Path) -> bytes:
    """A file of ours, which is no link."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        return file.read()


def _is_ours(move: tuple[str, str]) -> bool:
    """Whether a move is one that `commit` makes: inside the folder, between it and the hidden one."""
    paths = [Path(path) for path in move]
    inside = all(not path.is_absolute() and path.parts and ".." not in path.parts for path in paths)
    return inside and any(path.parts[0] == STATE_FOLDER for path in paths)


def _names_in(out: Path) -> list[str]:
    """What the user sees in `out`, as it will be once a commit that a kill left half done is taken back."""
    moves, changed = _read_moves(out), dict[str, bool]()

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


def _remove_empty(folder: Path, out: Path) -> None:
    """Remove folders from `folder` up to `out`, `out` excluded, that hold nothing."""
    with suppress(OSError):
        while folder != out:
            folder.rmdir()
            folder = folder.parent
