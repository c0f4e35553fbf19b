"""The only import of huggingface_hub: repositories as a source of bytes, and model card metadata."""

from __future__ import annotations

import difflib
import glob
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantconvert.checkpoint import LocalFolder, Repo, RepoFile, open_subfolder
from quantconvert.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BLOCK = 1 << 19


def open_repo(source: str | os.PathLike[str], revision: str | None, subfolder: str | None = None) -> Repo:
    """A local folder where one exists, else a Hub repository where the name looks like one; or one folder inside it.

    Raises `CheckpointError` when it is neither.
    """
    repo = _open(source, revision)
    return repo if subfolder is None else open_subfolder(repo, subfolder)


def _open(source: str | os.PathLike[str], revision: str | None) -> Repo:
    text = os.fspath(source)
    if not text:
        raise UsageError("the source is empty: expected a folder or a Hub repository id")
    path = Path(text).expanduser()
    if path.exists() or not _REPO_ID.fullmatch(text):
        if revision is not None:
            raise CheckpointError(f"--revision {revision} is for Hub repositories, `{source}` is a local path")
        return LocalFolder(path, text)
    return _cached(text, revision) or HubRepo(text, revision)


def _cached(repo_id: str, revision: str | None) -> LocalFolder | None:
    """The snapshot in huggingface_hub's cache, when the user works offline (HF_HUB_OFFLINE) and has one."""
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.is_offline_mode():
        return None
    config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return LocalFolder(folder, repo_id, folder.name)


def _near(text: str) -> str | None:
    """A folder that the user may have meant."""
    path = Path(text)
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean `{path.parent / close[0]}`?" if close else None


class HubRepo:
    """A model repository on the Hub, pinned to one commit; headers are read as byte ranges.

    Raises `CheckpointError` when the repository or revision does not exist or cannot be reached.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.location = repo_id
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except Exception as error:  # whatever the layers below raise: no name, no network, no such repository
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"`{repo_id}` is no local folder, and the Hub does not give it: {reason}",
                hint=_near(repo_id) or "check the spelling; for a private or gated model run `hf auth login` first",
            ) from error
        self._asked = revision
        self._sha = info.sha or "main"
        self._files = tuple(
            sorted((RepoFile(s.rfilename, s.size or 0) for s in info.siblings or ()), key=lambda file: file.path)
        )
        self._heads: dict[str, bytes] = {}
        self._fs: HfFileSystem | None = None

    @property
    def revision(self) -> str | None:
        return self._sha

    def files(self) -> tuple[RepoFile, ...]:
        return self._files

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """A byte range; the first half megabyte of each file is fetched once and serves most headers whole."""
        if offset + nbytes > _BLOCK:
            return self._fetch(path, offset, nbytes)
        if path not in self._heads:
            self._heads[path] = self._fetch(path, 0, _BLOCK)
        return self._heads[path][offset : offset + nbytes]

    def _fetch(self, path: str, offset: int, nbytes: int) -> bytes:
        from huggingface_hub import HfFileSystem

        if self._fs is None:
            self._fs = HfFileSystem()
        size = next(file.nbytes for file in self._files if file.path == path)
        end = min(offset + nbytes, size)
        if end <= offset:
            return b""
        try:
            with self._fs.open(
                f"{self.location}@{self._sha}/{path}", "rb", block_size=end - offset, cache_type="none"
            ) as file:
                file.seek(offset)
                data: bytes = file.read(end - offset)
        except OSError as error:
            raise CheckpointError(f"cannot read `{path}` of `{self.location}`: {error}") from error
        return data

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
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot download `{self.location}`: {error}") from error


def card_metadata(card: str | None) -> tuple[dict[str, Any], str]:
    """Metadata and text of a model card; both empty where there is none, metadata empty where it does not parse."""
    if card is None:
        return {}, ""
    from huggingface_hub import RepoCard

    try:
        parsed = RepoCard(card, ignore_metadata_errors=True)
    except Exception:  # yaml errors of every kind; a strange card is no reason to refuse a model
        return {}, card
    metadata: dict[str, Any] = parsed.data.to_dict()  # type: ignore[no-untyped-call]
    return metadata, parsed.text


def metadata_block(metadata: dict[str, Any]) -> str:
    """YAML for the front matter of a model card, ending in a newline."""
    from huggingface_hub import ModelCardData

    return str(ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()) + "\n"
