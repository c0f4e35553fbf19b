"""The output folder: everything is built in one hidden folder inside it and moved into place when all is complete.

The last file moved is config.json, without which no reader takes a folder for a checkpoint; with --overwrite the old
config.json goes first and the old weights after it, so that no reader ever sees a mixture.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from quantconvert.checkpoint import LocalFolder
from quantconvert.checkpoint.files import INDEX_NAME, STATE_FOLDER, kind_of
from quantconvert.errors import OutputError, QuantConvertError

CONFIG = "config.json"
OLD = ".old"


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        found = sorted(path.name for path in out.iterdir() if path.name != STATE_FOLDER)
        if found and not overwrite:
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
    """The refusal when the result cannot fit (a leftover of an interrupted run is counted as free)."""
    state = out / STATE_FOLDER
    left = sum(path.stat().st_size for path in state.rglob("*") if path.is_file()) if state.is_dir() else 0
    free = free_nbytes(out) + left
    if needed <= free:
        return []
    hint = "free some space, or choose a folder on another disk"
    return [OutputError(f"disk of `{out}` is too small: the result needs {needed} bytes, {free} are free", hint=hint)]


class OutputFolder:
    """`out`, and the hidden folder in it where a conversion builds its files."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.state = out / STATE_FOLDER
        self._made = [p for p in (out, *out.parents) if not p.exists()]

    def prepare(self) -> None:
        """Create both; what an interrupted run left in the hidden folder is removed."""
        try:
            if self.state.exists():
                shutil.rmtree(self.state)
            self.state.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot create `{self.state}`: {error.strerror}") from error

    def write(self, path: str, content: bytes) -> None:
        """A complete, synced file in the hidden folder."""
        target = self.state / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write `{path}`: {error.strerror}") from error

    def copy(self, source: Path, path: str) -> None:
        """A file of the source repository, content only, into the hidden folder."""
        target = self.state / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
            fd = os.open(target, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise OutputError(f"cannot copy `{path}`: {error.strerror}") from error

    def commit(self) -> None:
        """Move everything into place: old config and weights out, weights in, other files, config.json last."""
        new = sorted(file.path for file in LocalFolder(self.state).files())
        new.sort(key=lambda path: (path == CONFIG, path == INDEX_NAME, not path.endswith(".safetensors")))
        old = [file.path for file in LocalFolder(self.out).files()]
        old = [path for path in old if path in new or path == INDEX_NAME or kind_of(path) == "duplicate"]
        old.sort(key=lambda path: path != CONFIG)
        moves = [(self.out / path, self.state / OLD / path) for path in old]
        moves += [(self.state / path, self.out / path) for path in new]
        made = sorted({p for _, t in moves for p in t.parents if not p.exists()}, reverse=True)
        try:
            for source, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                if target == self.out / CONFIG:
                    fsync_folder(self.out)
                source.replace(target)
                if source == self.out / CONFIG:
                    fsync_folder(self.out)
            fsync_folder(self.out)
        except BaseException as error:
            self._undo(moves, made)
            if isinstance(error, OSError):
                raise OutputError(f"cannot move the result into `{self.out}`: {error.strerror}") from error
            raise
        shutil.rmtree(self.state, ignore_errors=True)

    def _undo(self, moves: list[tuple[Path, Path]], made: list[Path]) -> None:
        """Take back what was moved, in reverse, and the folders made for it."""
        for source, target in reversed(moves):
            if not source.exists() and target.exists():
                target.replace(source)
        for folder in made:
            if self.state not in folder.parents:
                with suppress(OSError):
                    folder.rmdir()

    def abandon(self) -> None:
        """Remove what this run built, and the folders it created."""
        shutil.rmtree(self.state, ignore_errors=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return
