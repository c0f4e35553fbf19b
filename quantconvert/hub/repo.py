"""One repository on the Hub at one commit."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantconvert.checkpoint import RepoFile
from quantconvert.checkpoint.contents import Download
from quantconvert.checkpoint.ranges import LocalReader, RangeReader, Version
from quantconvert.errors import CheckpointError
from quantconvert.hub.near import near
from quantconvert.hub.reader import HubReader
from quantconvert.hub.retry import LATER, is_unreachable, reason_of, retried, status_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_BLOCK = 1 << 19
_MAX_HEADS = 32


class Unreachable(CheckpointError):
    """The Hub did not answer at all: no network, no such host, no way through."""


class HubRepo:
    """A model repository on the Hub, pinned to one commit; headers are read as byte ranges.

    Raises `CheckpointError` when the repository or revision does not exist or cannot be reached.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.location = repo_id
        try:
            info = retried(lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True), status_of)
        except Exception as error:  # whatever the layers below raise: no name, no network, no such repository
            if status_of(error):
                raise CheckpointError(
                    f"the Hub does not give `{repo_id}` now: {reason_of(error)}", hint=LATER
                ) from error
            if is_unreachable(error):
                raise Unreachable(
                    f"`{repo_id}` is no local folder, and the Hub cannot be reached: {reason_of(error)}",
                    hint=near(repo_id) or "check the network; what huggingface_hub's cache holds whole is used without",
                ) from error
            raise CheckpointError(
                f"`{repo_id}` is no local folder, and the Hub does not give it: {reason_of(error)}",
                hint=near(repo_id) or "check the spelling; for a private or gated model run `hf auth login` first",
            ) from error
        self._asked = revision
        self._sha = info.sha or "main"
        self._files = tuple(sorted(map(_file, info.siblings or ()), key=lambda file: file.path))
        self._heads: dict[str, bytes] = {}
        self._local: Path | None = None
        self._locations: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_heads": {}, "_locations": {}}  # megabytes that come again, and signed

    @property
    def revision(self) -> str | None:
        return self._sha

    def files(self) -> tuple[RepoFile, ...]:
        return self._files

    def open(self, path: str) -> RangeReader:
        """A reader of ranges, of the downloaded file where there is one; raises `CheckpointError`."""
        if self._local is not None and (self._local / path).is_file():
            return LocalReader(self._local / path, path)
        file = next((file for file in self._files if file.path == path), None)
        if file is None:
            raise CheckpointError(f"`{self.location}` has no file `{path}`")
        return HubReader(self.location, self._sha, file, self._locations)

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """A byte range; the first half megabyte of each file is fetched once and serves most headers whole."""
        if offset + nbytes > _BLOCK:
            return self._fetch(path, offset, nbytes)
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._fetch(path, 0, _BLOCK)
            for old in list(self._heads)[:-_MAX_HEADS]:
                self._heads.pop(old, None)
        return head[offset : offset + nbytes]

    def _fetch(self, path: str, offset: int, nbytes: int) -> bytes:
        reader = self.open(path)
        try:
            data = bytearray(max(0, min(offset + nbytes, reader.version().nbytes) - offset))
            reader.read_into(memoryview(data), offset)
        finally:
            reader.close()
        return bytes(data)

    def prepare(self, paths: tuple[str, ...]) -> None:
        self._local = self.materialize(paths)

    def download(self, paths: tuple[str, ...]) -> Download | None:
        """What of `paths` is not in huggingface_hub's cache yet."""
        from huggingface_hub import constants, try_to_load_from_cache

        absent = [
            file.nbytes
            for file in self._files
            if file.path in paths
            and not isinstance(try_to_load_from_cache(self.location, file.path, revision=self._sha), str)
        ]
        return Download(Path(constants.HF_HUB_CACHE), sum(absent))

    def materialize(self, paths: tuple[str, ...]) -> Path:
        """Download exactly `paths` into huggingface_hub's cache (what is there is not fetched again)."""
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(path) for path in paths]
        try:
            # by the name that was asked for, so that the cache remembers it; by commit if it has moved since the plan
            path = Path(snapshot_download(self.location, revision=self._asked, allow_patterns=patterns))
            if path.name != self._sha:
                path = Path(snapshot_download(self.location, revision=self._sha, allow_patterns=patterns))
            return path
        except Exception as error:  # whatever the layers below raise, as above
            raise CheckpointError(f"cannot download `{self.location}`: {reason_of(error)}") from error


def _file(sibling: RepoSibling) -> RepoFile:
    """A file as the Hub lists it; large ones have a sha256, others git's name for their content."""
    nbytes = sibling.size or 0
    return RepoFile(
        sibling.rfilename,
        nbytes,
        Version(nbytes, etag=sibling.lfs.sha256 if sibling.lfs else sibling.blob_id),
        sibling.lfs.sha256 if sibling.lfs else None,
    )
