"""One folder of a repository as a checkpoint of its own: the text encoder of a pipeline, for example."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from quantconvert.checkpoint.contents import Download, Repo, RepoFile
from quantconvert.checkpoint.local import LocalFolder
from quantconvert.checkpoint.ranges import RangeReader
from quantconvert.errors import CheckpointError, UsageError


def open_subfolder(repo: Repo, folder: str) -> Repo:
    """The folder `folder` of `repo`; raises `UsageError` outside it, `CheckpointError` where there is none."""
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
        raise UsageError(f"--subfolder: expected a folder inside the source, got `{folder}`")
    if not any(file.path.startswith(f"{path}/") for file in repo.files()):
        folders = sorted({file.path.rpartition("/")[0] for file in repo.files() if file.path.endswith("/config.json")})
        hint = f"folders with a config.json: {', '.join(folders[:5])}" if folders else None
        raise CheckpointError(f"`{repo.location}` has no folder `{folder}`", hint=hint)
    if isinstance(repo, LocalFolder):
        return LocalFolder(repo.path / path, f"{repo.location.rstrip('/')}/{path}", repo.revision)
    return Subfolder(repo, str(path))


class Subfolder:
    """A `Repo` whose paths start inside a folder of another one."""

    def __init__(self, repo: Repo, folder: str) -> None:
        self._repo, self._prefix = repo, folder + "/"

    @property
    def location(self) -> str:
        return f"{self._repo.location}/{self._prefix[:-1]}"

    @property
    def revision(self) -> str | None:
        return self._repo.revision

    def files(self) -> tuple[RepoFile, ...]:
        prefix = self._prefix
        inside = (file for file in self._repo.files() if file.path.startswith(prefix))
        return tuple(replace(file, path=file.path.removeprefix(prefix)) for file in inside)

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return self._repo.read(self._prefix + path, offset, nbytes)

    def open(self, path: str) -> RangeReader:
        return self._repo.open(self._prefix + path)

    def prepare(self, paths: tuple[str, ...]) -> None:
        self._repo.prepare(self._whole(paths))

    def download(self, paths: tuple[str, ...]) -> Download | None:
        return self._repo.download(self._whole(paths))

    def materialize(self, paths: tuple[str, ...]) -> Path:
        return self._repo.materialize(self._whole(paths)) / self._prefix

    def _whole(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self._prefix + path for path in paths)
