"""A model repository in a local folder."""

from __future__ import annotations

import os
from pathlib import Path

from quantconvert.checkpoint.model import RepoFile
from quantconvert.errors import CheckpointError


class LocalFolder:
    """A folder as a `Repo`; raises `CheckpointError` when it does not exist or is no folder."""

    def __init__(self, path: Path, location: str | None = None, revision: str | None = None) -> None:
        if not path.exists():
            raise CheckpointError(f"source `{path}` does not exist")
        if not path.is_dir():
            raise CheckpointError(f"source `{path}` is a file: expected a folder with config.json and *.safetensors")
        self.path = path
        self.location = location or str(path)
        self.revision = revision

    def files(self) -> tuple[RepoFile, ...]:
        found = []
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
            for file in names:
                path = Path(folder, file)
                if path.is_file():
                    status = path.stat()
                    name = path.relative_to(self.path).as_posix()
                    found.append(RepoFile(name, status.st_size, status.st_mtime_ns))
        return tuple(sorted(found, key=lambda file: file.path))

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        try:
            with open(self.path / path, "rb") as file:
                file.seek(offset)
                return file.read(nbytes)
        except OSError as error:
            raise CheckpointError(f"cannot read `{path}` of `{self.location}`: {error.strerror}") from error

    def materialize(self, paths: tuple[str, ...]) -> Path:
        return self.path
