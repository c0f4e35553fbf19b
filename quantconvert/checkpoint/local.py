"""A model repository in a local folder, which may come from anyone: nothing outside it is read through its links."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from quantconvert.checkpoint.contents import Download, RepoFile
from quantconvert.checkpoint.files import MAX_FILES, MAX_REPORTED
from quantconvert.checkpoint.ranges import LocalReader, Version, open_regular
from quantconvert.errors import CheckpointError, QuantConvertError, raise_all
from quantconvert.text import quoted

MAX_DEPTH = 32
_SHA256 = re.compile("[0-9a-f]{64}")
_KINDS = (
    (stat.S_ISFIFO, "a fifo"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)  # fmt: skip


class LocalFolder:
    """A folder as a `Repo`; raises `CheckpointError` when it does not exist or is no folder.

    Symbolic links are followed to files inside the folder and, in a snapshot of huggingface_hub's cache
    (`models--*/snapshots/<commit>`), to the `blobs` of the same repository. Any other link is refused, be it a
    weight, a config or a side file that would be copied: its target may be a secret, and results are published.
    All such links are one refusal, with a way out.
    """

    def __init__(self, path: Path, location: str | None = None, revision: str | None = None) -> None:
        if not exists(path):
            raise CheckpointError(f"source `{path}` does not exist")
        if not path.is_dir():
            raise CheckpointError(f"source `{path}` is a file: expected a folder with config.json and *.safetensors")
        self.path = path
        self.location = location or str(path)
        self.revision = revision

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"path": self.path.absolute()}  # another process may stand elsewhere

    def files(self) -> tuple[RepoFile, ...]:
        """Every file but hidden ones; raises all refusals about links, special files and names at once."""
        found: list[RepoFile] = []
        errors: list[QuantConvertError] = []
        homes, leaving = _homes(self.path), dict[str, str]()
        for path, entry in self._walk():
            target = _outside(entry, homes)
            problem = None if target else _problem(path, entry)
            if target:
                leaving[path] = target
            elif problem is not None:
                errors.append(problem)
            else:
                status = entry.stat()
                known = Version(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                found.append(RepoFile(path, status.st_size, known, _blob(entry)))
            if len(errors) == MAX_REPORTED:
                break
        raise_all([*([_links_out(self.location, leaving)] if leaving else []), *errors])
        return tuple(sorted(found, key=lambda file: file.path))

    def _walk(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Path and entry of everything that is no folder, without following links to folders; hidden ones left out."""
        waiting, seen = [("", 0)], 0
        while waiting:
            below, depth = waiting.pop()
            if depth > MAX_DEPTH:
                raise CheckpointError(f"source `{self.location}` has folders too deep inside it: {quoted(below)}")
            try:
                with os.scandir(self.path / below) as entries:
                    inside = list(islice(entries, MAX_FILES + 1))
            except OSError as error:
                raise CheckpointError(f"cannot read `{below or '.'}` of `{self.location}`: {error.strerror}") from error
            seen += len(inside)
            if seen > MAX_FILES:
                raise CheckpointError(f"source `{self.location}` has more than {MAX_FILES} files: expected one model")
            for entry in sorted(inside, key=lambda entry: entry.name):
                path = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting += [] if entry.name.startswith(".") else [(path, depth + 1)]
                elif not entry.name.startswith(".") or entry.name == ".gitattributes":
                    yield path, entry

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """So many bytes of a file from `offset` on, fewer at its end; raises `CheckpointError`."""
        try:
            with open(self.path / path, "rb", opener=open_regular) as file:
                file.seek(offset)
                return file.read(nbytes)
        except OSError as error:
            raise CheckpointError(f"cannot read `{path}` of `{self.location}`: {error.strerror}") from error

    def open(self, path: str) -> LocalReader:
        return LocalReader(self.path / path, path)

    def prepare(self, paths: tuple[str, ...]) -> None:
        return None

    def download(self, paths: tuple[str, ...]) -> Download | None:
        return None

    def materialize(self, paths: tuple[str, ...]) -> Path:
        return self.path


def exists(path: Path) -> bool:
    """Whether there is something at `path`; nothing can be where the name is too long or cannot be looked up."""
    try:
        return path.exists()
    except OSError:
        return False


def _homes(folder: Path) -> tuple[str, ...]:
    """Where the folder's links may lead: into itself, and from a cached snapshot into the same repository's blobs."""
    real = Path(os.path.realpath(folder))
    homes = [real]
    for above in real.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            homes.append(above.parent / "blobs")
    return tuple(os.path.join(home, "") for home in homes)


def _outside(entry: os.DirEntry[str], homes: tuple[str, ...]) -> str | None:
    """Where a link leads, if that is none of `homes`."""
    target = os.path.realpath(entry.path) if entry.is_symlink() else None
    return None if target is None or os.path.join(target, "").startswith(homes) else target


def _blob(entry: os.DirEntry[str]) -> str | None:
    """The sha256 by which huggingface_hub's cache names the blob that a link leads to (git's own names are shorter)."""
    if not entry.is_symlink():
        return None
    target = Path(os.path.realpath(entry.path))
    return target.name if target.parent.name == "blobs" and _SHA256.fullmatch(target.name) else None


def _links_out(location: str, leaving: Mapping[str, str]) -> CheckpointError:
    """One refusal for all links that leave the source, with the way out: the folder they lead to, or hard links."""
    (path, target), folders = next(iter(leaving.items())), {str(Path(target).parent) for target in leaving.values()}
    if len(leaving) == 1:
        return CheckpointError(
            f"{quoted(path)} is a link out of the source, to {quoted(target)}",
            hint="put the file itself into the folder",
        )
    named = ", ".join(quoted(name) for name in list(leaving)[:3])
    more = f" and {len(leaving) - 3} more" if len(leaving) > 3 else ""
    if len(folders) == 1:
        folder = folders.pop()
        message, hint = f"links out of the source, to {quoted(folder)}", f"give {quoted(folder)} itself as the source"
    else:
        message = f"links out of the source, {quoted(path)} to {quoted(target)}"
        hint = f"`cp -rL {location} DIR` copies what they lead to; with `-l` too it takes no space on one disk"
    return CheckpointError(f"{named}{more} are {message}", hint=hint)


def _problem(path: str, entry: os.DirEntry[str]) -> CheckpointError | None:
    """Why this file, which lies in the source, cannot be a part of a model, or None."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return CheckpointError(f"{quoted(path)} is a link that leads nowhere", hint="download or copy this file again")
    if stat.S_ISREG(mode):
        return None
    kind = next((name for matches, name in _KINDS if matches(mode)), "something else")
    return CheckpointError(f"{quoted(path)} is no regular file but {kind}")
