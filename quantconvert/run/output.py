"""The output folder: everything is built in one hidden folder inside it and moved into place when all is complete.

The last file moved is config.json, without which no reader takes a folder for a checkpoint; with --overwrite the old
config.json goes first and the old weights after it, so that no reader ever sees a mixture.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from quantconvert.checkpoint.files import INDEX_NAME, STATE_FOLDER, is_stale
from quantconvert.checkpoint.local import open_regular
from quantconvert.errors import OutputError, QuantConvertError

CONFIG = "config.json"
OLD, MOVES = ".old", ".moves.json"
COPY_NBYTES = 1 << 20


def _paths(folder: Path) -> list[str]:
    """Every file in `folder` except in hidden folders, sorted; links count as files, and are never followed."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(found)


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
        if (out / STATE_FOLDER / MOVES).exists():  # a kill in the middle of a commit: the old one is in there
            found = sorted({*found, CONFIG})
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
                self.restore()
                if (self.state / MOVES).exists():
                    raise OutputError(f"`{self.state}` holds the checkpoint that an interrupted --overwrite moved away")
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
            with open(source / path, "rb", opener=open_regular) as old, open(target, "wb") as new:
                shutil.copyfileobj(old, new, COPY_NBYTES)
                new.flush()
                os.fsync(new.fileno())
        except OSError as error:
            raise OutputError(f"cannot copy `{path}`: {error.strerror}") from error

    def commit(self) -> None:
        """Move everything into place: old config and weights out, weights in, other files, config.json last.

        The moves are on disk before the first is made, so that `restore` can take back what a kill left half done.
        """
        new = _paths(self.state)
        new.sort(key=lambda path: (path == CONFIG, path == INDEX_NAME, not path.endswith(".safetensors")))
        old = [path for path in _paths(self.out) if path in new or is_stale(path)]
        old.sort(key=lambda path: path != CONFIG)
        moves = [(path, f"{STATE_FOLDER}/{OLD}/{path}") for path in old]
        moves += [(f"{STATE_FOLDER}/{path}", path) for path in new]
        self.write(MOVES, json.dumps(moves).encode())
        made = sorted({p for _, t in moves for p in (self.out / t).parents if not p.exists()}, reverse=True)
        try:
            for source, target in moves:
                (self.out / target).parent.mkdir(parents=True, exist_ok=True)
                if target == CONFIG:
                    fsync_folder(self.out)
                (self.out / source).replace(self.out / target)
                if source == CONFIG:
                    fsync_folder(self.out)
            fsync_folder(self.out)
        except BaseException as error:
            self.restore()
            for folder in made:
                if self.state not in folder.parents:
                    with suppress(OSError):
                        folder.rmdir()
            if isinstance(error, OSError):
                raise OutputError(f"cannot move the result into `{self.out}`: {error.strerror}") from error
            raise
        (self.state / MOVES).unlink()
        shutil.rmtree(self.state, ignore_errors=True)

    def restore(self) -> None:
        """Take back the moves of a commit that did not end, in reverse; one that fails is left for the next time."""
        journal = self.state / MOVES
        if not journal.is_file():
            return
        failed = False
        for source, target in reversed(json.loads(journal.read_bytes())):
            here, there = self.out / source, self.out / target
            if not here.exists() and there.exists():
                try:
                    there.replace(here)
                except OSError:
                    failed = True
        if not failed:
            journal.unlink()

    def abandon(self) -> None:
        """Remove what this run built, and the folders it created; not while an old checkpoint is in there."""
        if (self.state / MOVES).exists():
            return
        shutil.rmtree(self.state, ignore_errors=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return
