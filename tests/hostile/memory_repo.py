"""A repository that is no folder."""

from __future__ import annotations

from pathlib import Path

from quantconvert.checkpoint import RepoFile
from quantconvert.checkpoint.contents import Download
from quantconvert.checkpoint.ranges import RangeReader


class MemoryRepo:
    """A repository that is a dictionary."""

    location, revision = "memory", None

    def __init__(self, contents: dict[str, bytes], lie: int = 0) -> None:
        self.contents, self.lie = contents, lie

    def files(self) -> tuple[RepoFile, ...]:
        return tuple(RepoFile(path, len(data) + self.lie) for path, data in sorted(self.contents.items()))

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return self.contents[path][offset : offset + nbytes]

    def open(self, path: str) -> RangeReader:
        raise AssertionError("nothing here converts")

    def prepare(self, paths: tuple[str, ...]) -> None:
        raise AssertionError("nothing here converts")

    def download(self, paths: tuple[str, ...]) -> Download | None:
        return None

    def materialize(self, paths: tuple[str, ...]) -> Path:
        raise AssertionError("nothing here converts")
