"""The output folder of one conversion, from the lock to the moves; what its states are says `state.py`."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from quantconvert import machine
from quantconvert.checkpoint.files import STATE_FOLDER
from quantconvert.checkpoint.ranges import RangeReader
from quantconvert.errors import OutputError
from quantconvert.events import Note, Reporter
from quantconvert.planning import Plan
from quantconvert.run.disk import copy_file, fsync_folder, write_file
from quantconvert.run.folder.commit import commit, file_paths, holds_old, restore
from quantconvert.run.folder.lock import Lock
from quantconvert.run.folder.signature import differences, identity
from quantconvert.run.folder.state import DONE, JOB, JOURNAL, LOCK, OURS, RESERVE, read_object
from quantconvert.run.journal import Journal, is_blank

RESTART_HINT = "--restart starts over, or give the source and options of before"


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
            restore(self.out)
        except OSError as error:
            raise OutputError(f"cannot create `{self.state}`: {error.strerror}") from error
        if holds_old(self.out):
            raise OutputError(f"`{self.state}` holds the checkpoint that an interrupted --overwrite moved away")

    def release(self) -> None:
        """Let another process have it; where nothing was begun, nothing stays behind."""
        with suppress(OSError):
            begun = {LOCK, JOB, JOURNAL, RESERVE} if self._lock.held and is_blank(self.state / JOURNAL) else set()
            if {path.name for path in self.state.iterdir()} <= begun:
                self.clear()
        self._lock.release()

    def tidy(self) -> None:
        """Remove what a conversion left that has ended; its result stays."""
        with suppress(OSError):
            self._clear_state()
            (self.state / DONE).unlink(missing_ok=True)

    def resume(self, plan: Plan, restart: bool, reserve: int = 0) -> Journal:
        """The journal of the interrupted run that the hidden folder holds, or an empty one.

        reserve: bytes to keep free for what `write` and `copy` will bring, until `use_reserve`. Raises `OutputError`
        when that run was of another conversion, unless `restart` discards it.
        """
        new, old = identity(plan), read_object(self.state / JOB)
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
            self._reserve(reserve)
        except OSError as error:
            raise OutputError(f"cannot write in `{self.state}`: {error.strerror}") from error
        journal = Journal(self.state / JOURNAL, plan)
        if journal.done:
            self._note(f"continuing: {len(journal.done)} of {len(plan.tasks)} tasks are done")
        return journal

    def _note(self, text: str) -> None:
        self.report(Note("resume", text))

    def _reserve(self, nbytes: int) -> None:
        fd = os.open(self.state / RESERVE, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            machine.allocate(fd, nbytes)
        finally:
            os.close(fd)

    def use_reserve(self) -> None:
        """Give up the room that was kept, for the files that follow."""
        self._check_there()
        with suppress(OSError):
            (self.state / RESERVE).unlink()

    @property
    def is_there(self) -> bool:
        """Whether the hidden folder is the one that was locked: nobody took it away, or put another in its place."""
        return self._lock.is_named

    def _check_there(self) -> None:
        """What is in another folder of this name is not all that was built."""
        if not self.is_there:
            raise OutputError(
                f"output `{self.out}` was removed or replaced while it was written",
                hint="give the same command again when nobody else changes that folder",
            )

    def write(self, path: str, content: bytes) -> None:
        """A complete, synced file in the hidden folder."""
        self._check_there()
        try:
            (self.state / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.state / path, content)
        except OSError as error:
            raise OutputError(f"cannot write `{path}`: {error.strerror}") from error

    def copy(self, source: RangeReader, path: str) -> None:
        """A file of the source repository, content only, into the hidden folder."""
        self._check_there()
        try:
            (self.state / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, self.state / path)
        except OSError as error:
            raise OutputError(f"cannot copy `{path}`: {error.strerror}") from error

    @property
    def files(self) -> tuple[str, ...]:
        """What has been built so far, by path in the checkpoint."""
        return tuple(path for path in file_paths(self.state) if path not in OURS)

    def commit(self) -> None:
        """Move everything into place, then remove the hidden folder; raises `OutputError`, with all taken back."""
        self._check_there()
        commit(self.out, self.files)
        with suppress(OSError):
            self.clear()

    def abandon(self) -> None:
        """Remove what this run built, and the folders it created; not while an old checkpoint is in there.

        Where somebody took the folder away there is nothing of ours to remove.
        """
        if self.is_there and not holds_old(self.out):
            with suppress(OSError):
                self.clear()

    def clear(self) -> None:
        """Remove the hidden folder, the proof that a commit has ended last; then folders that we made."""
        self._clear_state()
        for name in (LOCK, DONE):
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
