"""Checkpoints behind an address that fsspec knows: `s3://`, `gs://`, `az://` and others, by ranges.

Each kind of address needs a package of its own (`s3fs`, `gcsfs`, `adlfs`), which the user installs, and takes
credentials from where that package does.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import RepoFile
from quantconvert.checkpoint.contents import Download
from quantconvert.checkpoint.ranges import RangeReader, RemoteReader, Take, Version, Wrong
from quantconvert.errors import CheckpointError
from quantconvert.hub.retry import LATER, reason_of, retried
from quantconvert.spans import spans

# What one request asks for.
CHUNK_NBYTES = 8_000_000
_SECRET = re.compile(r"(?<=://)[^/@]*@")


def open_bucket(address: str) -> BucketRepo:
    """The checkpoint at an address; raises `CheckpointError` where fsspec does not know it, or it is not there."""
    import fsspec

    shown = _SECRET.sub("", address)
    try:
        files, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        hint = "download it first, and give the folder"
        if isinstance(error, ImportError):
            hint = f"install the package that reads `{shown.partition('://')[0]}://`, or {hint}"
        raise CheckpointError(f"source `{shown}` cannot be read: {reason_of(error)}", hint=hint) from error
    return BucketRepo(files, root.rstrip("/"), shown)


class BucketRepo:
    """Everything below one path of a file system of fsspec's, as a `Repo` that comes by ranges alone."""

    def __init__(self, files: Any, root: str, location: str) -> None:
        self.location, self._fs, self._root = location, files, root
        try:
            found = retried(lambda: files.find(root, detail=True), _may_pass)
        except Exception as error:  # whatever the layers below raise
            raise CheckpointError(f"cannot list `{location}`: {reason_of(error)}") from error
        entries = {path[len(root) :].lstrip("/"): info for path, info in found.items()}
        named = [_file(path, info) for path, info in sorted(entries.items()) if path and not path.endswith("/")]
        if not named:
            raise CheckpointError(f"`{location}` holds nothing", hint="check the spelling, and the credentials")
        self._files = tuple(file for file in named if not file.path.rpartition("/")[2].startswith("."))

    @property
    def revision(self) -> str | None:
        return None

    def files(self) -> tuple[RepoFile, ...]:
        return self._files

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        file = self._file(path)
        data = bytearray(max(0, min(nbytes, file.nbytes - offset)))
        self.open(path).read_into(memoryview(data), offset)
        return bytes(data)

    def open(self, path: str) -> RangeReader:
        return BucketReader(self._fs, f"{self._root}/{path}", self._file(path), self.location)

    def _file(self, path: str) -> RepoFile:
        file = next((file for file in self._files if file.path == path), None)
        if file is None:
            raise CheckpointError(f"`{self.location}` has no file `{path}`")
        return file

    def prepare(self, paths: tuple[str, ...]) -> None:
        return None

    def download(self, paths: tuple[str, ...]) -> Download | None:
        return Download(Path(), sum(self._file(path).nbytes for path in paths), only_ranges=True)

    def materialize(self, paths: tuple[str, ...]) -> Path:
        raise CheckpointError(
            f"`{paths[0] if paths else self.location}` cannot be read by ranges", hint="download it, give the folder"
        )


class BucketReader(RemoteReader):
    """One file; an answer that is not as long as the range is asked for again, then refused."""

    def __init__(self, files: Any, path: str, file: RepoFile, location: str) -> None:
        self._fs, self._path, self.file, self._location = files, path, file, location

    def fetch(self, offset: int, nbytes: int, take: Take) -> None:
        """Hand over the bytes in pieces; raises `CheckpointError`."""
        for begin, end in spans(offset, offset + nbytes, CHUNK_NBYTES):
            try:
                data = retried(partial(self._get, begin, end), _may_pass)
            except CheckpointError:
                raise
            except Exception as error:  # whatever the layers below raise
                text = f"cannot read `{self.file.path}` of `{self._location}`: {reason_of(error)}"
                raise CheckpointError(text, hint=LATER.replace("the Hub", "the store")) from error
            take(data, begin)

    def _get(self, begin: int, end: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path, start=begin, end=end)
        if len(data) != end - begin:
            where = f"`{self.file.path}` of `{self._location}`"
            raise Wrong(f"cannot read {where}: asked for {end - begin} bytes at {begin}, got {len(data)}")
        return data

    def version(self) -> Version:
        """What the store says now."""
        try:
            self._fs.invalidate_cache()
            return _file(self.file.path, retried(lambda: self._fs.info(self._path), _may_pass)).version or Version(0)
        except Exception as error:  # whatever the layers below raise
            raise CheckpointError(
                f"cannot look at `{self.file.path}` of `{self._location}`: {reason_of(error)}"
            ) from error


def _file(path: str, info: dict[str, Any]) -> RepoFile:
    nbytes, etag = int(info.get("size") or 0), info.get("ETag") or info.get("etag")
    return RepoFile(path, nbytes, Version(nbytes, etag=str(etag).strip('"') if etag else None))


def _may_pass(error: Exception) -> bool:
    """Whatever is not said to be missing or forbidden."""
    return not isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)
