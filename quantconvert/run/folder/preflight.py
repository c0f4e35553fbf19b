"""Refusals about the place that a result is to be written to, before anything is read or created."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantconvert.checkpoint.contents import Download
from quantconvert.checkpoint.files import STATE_FOLDER
from quantconvert.errors import OutputError, QuantConvertError
from quantconvert.run.folder.lock import probe
from quantconvert.run.folder.state import CONFIG, LOCK, OLD, read_moves, visible_names

_BESIDE = "choose a folder beside it"


def check_output(out: Path, source: Path | None, overwrite: bool, finished: bool = False) -> list[QuantConvertError]:
    """Refusals about the place to write to: not a folder, not empty, inside the source, not writable.

    finished: the folder holds a finished result that may be the very one asked for, which only the plan can tell.
    `check_place` comes before.
    """
    errors: list[QuantConvertError] = []
    resolved = out.resolve()
    if source is not None and resolved != source.resolve() and resolved.is_relative_to(source.resolve()):
        errors.append(OutputError(f"output `{out}` is inside the source `{source}`", hint=_BESIDE))
    if source is not None and source.resolve().is_relative_to(resolved):
        what = "is the source itself" if resolved == source.resolve() else f"contains the source `{source}`"
        errors.append(OutputError(f"output `{out}` {what}", hint=_BESIDE))
    elif out.exists() and not out.is_dir():
        errors.append(OutputError(f"output `{out}` exists and is not a folder"))
    elif out.is_dir():
        errors += _check_empty(out, overwrite or finished)
    return errors + _check_writable(out)


def check_place(out: Path) -> list[QuantConvertError]:
    """The refusal of a name that no folder can have, or of a link that leads nowhere."""
    try:
        out.stat()
    except FileNotFoundError:
        if out.is_symlink():
            text = f"output `{out}` is a link that leads nowhere, to `{out.readlink()}`"
            return [OutputError(text, hint="create that folder, or remove the link")]
    except NotADirectoryError:
        return []  # said by name further on
    except OSError as error:
        return [OutputError(f"cannot use output `{out}`: {error.strerror}", hint="choose another folder")]
    return []


def _check_empty(out: Path, may_be_full: bool) -> list[QuantConvertError]:
    found = visible_names(out)
    if found and not may_be_full:
        return [exists_error(out)]
    if found and CONFIG not in found:
        return [OutputError(f"output `{out}` is not empty and no checkpoint: --overwrite replaces only those")]
    return []


def exists_error(out: Path) -> OutputError:
    """The refusal of a folder that holds something."""
    found = visible_names(out)
    names = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
    return OutputError(
        f"output `{out}` exists and is not empty: it holds {names}",
        hint="--overwrite replaces a checkpoint once the new one is complete; or choose another folder",
    )


def _check_writable(out: Path) -> list[QuantConvertError]:
    parent = existing_parent(out)
    blocked = next((path for path in out.resolve().parents if path.exists() and not path.is_dir()), None)
    if blocked:
        return [OutputError(f"output `{out}` is inside `{blocked}`, which is not a folder")]
    if os.access(parent, os.W_OK):
        return []
    read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
    return [OutputError(f"cannot write in `{parent}`: {'read-only file system' if read_only else 'permission denied'}")]


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


def usable_nbytes(out: Path) -> int:
    """The same with what an interrupted run left there, as far as it takes room."""
    hidden = out / STATE_FOLDER
    left = [path for path in hidden.rglob("*") if OLD not in path.parts] if hidden.is_dir() else []
    left += [out / target for source, target in read_moves(out) if source.startswith(STATE_FOLDER)]
    status = [path.stat() for path in left if path.is_file()]
    return free_nbytes(out) + sum(min(found.st_size, 512 * found.st_blocks) for found in status)


def check_disk(out: Path, needed: int, download: Download | None = None) -> list[QuantConvertError]:
    """Refusals where the result, or the part of the source that is still to come from the Hub, cannot fit.

    What an interrupted run left is counted as free.
    """
    free = usable_nbytes(out)
    hint = "free some space, or choose a folder on another disk"
    if download is None or not download.nbytes:
        return _too_small(out, "the result needs", needed, free, hint)
    cache, coming = download.folder, download.nbytes
    hint += "; HF_HOME says where downloads go"
    if _disk_of(cache) == _disk_of(out):
        return _too_small(out, f"the result and the download into `{cache}` need", needed + coming, free, hint)
    errors = _too_small(out, "the result needs", needed, free, hint)
    return errors + _too_small(cache, "the download of the source needs", coming, free_nbytes(cache), hint)


def _disk_of(path: Path) -> int:
    """The number of the file system where `path` is or will be."""
    return existing_parent(path).stat().st_dev


def _too_small(place: Path, what: str, needed: int, free: int, hint: str) -> list[QuantConvertError]:
    if needed <= free:
        return []
    return [OutputError(f"disk of `{place}` is too small: {what} {needed} bytes, {free} are free", hint=hint)]
