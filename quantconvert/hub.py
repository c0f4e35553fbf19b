"""Repositories as a source of bytes. With `quantconvert.publish` the only import of huggingface_hub."""

from __future__ import annotations

import difflib
import glob
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantconvert.checkpoint import LocalFolder, Repo, RepoFile, open_subfolder
from quantconvert.checkpoint.contents import Download
from quantconvert.checkpoint.files import SINGLE_NAME, TORCH_NAME
from quantconvert.checkpoint.local import exists
from quantconvert.checkpoint.ranges import LocalReader, RangeReader, Version
from quantconvert.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PART = re.compile(r"-\d{1,6}-of-(\d{1,6})\.(safetensors|bin)$")
_BLOCK = 1 << 19
_MAX_HEADS = 32


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
    if "://" in text:
        raise _url_error(text)
    path = Path(os.path.expanduser(text))  # noqa: PTH111 (Path's own raises for an unknown user)
    if exists(path) or not _REPO_ID.fullmatch(text):
        if revision is not None:
            raise CheckpointError(f"--revision {revision} is for Hub repositories, `{source}` is a local path")
        return LocalFolder(path, text)
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return _cached(text, revision) or HubRepo(text, revision)
    try:
        return HubRepo(text, revision)
    except Unreachable:
        snapshot = _cached(text, revision)
        if snapshot is None or not _is_whole(snapshot.path):
            raise
        return snapshot


def checked_repo(repo_id: str) -> str:
    """The id of a repository to write to, with its owner; raises `UsageError`."""
    if not _REPO_ID.fullmatch(repo_id) or "/" not in repo_id:
        raise UsageError(f"`{repo_id}` is no repository to write to", hint="owner and name: me/model-int4")
    return repo_id


class Unreachable(CheckpointError):
    """The Hub did not answer at all: no network, no such host, no way through."""


def _is_whole(snapshot: Path) -> bool:
    """Whether a cached snapshot has its one file of weights, or as many as their names count."""
    names = {path.name for path in snapshot.iterdir()}
    if names & {SINGLE_NAME, TORCH_NAME}:
        return True
    parts = [match for match in map(_PART.search, names) if match]
    return bool(parts) and all(len(parts) == int(part[1]) for part in parts)


_HUB_URL = re.compile(r"(?:https?://[^/]*(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?([^/]+/[^/@?#]+).*")


def _url_error(text: str) -> CheckpointError:
    """The refusal of an address, with the repository's id where it is one of the Hub's."""
    match = _HUB_URL.fullmatch(text)
    hint = f"give the repository's id: {match[1]}" if match else "download it first, and give the folder"
    return CheckpointError(f"source `{text}` is an address: expected a folder or a Hub repository id", hint=hint)


def _cached(repo_id: str, revision: str | None) -> LocalFolder | None:
    """The snapshot in huggingface_hub's cache, where there is one."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return LocalFolder(folder, repo_id, folder.name)


def _near(text: str) -> str | None:
    """A folder that the user may have meant."""
    path = Path(text)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean `{path.parent / close[0]}`?" if close else None


def reason_of(error: Exception) -> str:
    """The first line of another library's message; what follows are its own hints."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
                    f"the Hub does not give `{repo_id}` now: {reason_of(error)}", hint=_LATER
                ) from error
            if is_unreachable(error):
                raise Unreachable(
                    f"`{repo_id}` is no local folder, and the Hub cannot be reached: {reason_of(error)}",
                    hint=_near(repo_id)
                    or "check the network; what huggingface_hub's cache holds whole is used without",
                ) from error
            raise CheckpointError(
                f"`{repo_id}` is no local folder, and the Hub does not give it: {reason_of(error)}",
                hint=_near(repo_id) or "check the spelling; for a private or gated model run `hf auth login` first",
            ) from error
        self._asked = revision
        self._sha = info.sha or "main"
        self._files = tuple(sorted(map(_file, info.siblings or ()), key=lambda file: file.path))
        self._heads: dict[str, bytes] = {}
        self._local: Path | None = None

    @property
    def revision(self) -> str | None:
        return self._sha

    def files(self) -> tuple[RepoFile, ...]:
        return self._files

    def open(self, path: str) -> RangeReader:
        if self._local is not None and (self._local / path).is_file():
            return LocalReader(self._local / path, path)
        file = next((file for file in self._files if file.path == path), None)
        if file is None:
            raise CheckpointError(f"`{self.location}` has no file `{path}`")
        return HubReader(self.location, self._sha, file)

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


class HubReader:
    """One file of a repository at one commit, by HTTP ranges; an answer that is not the range asked for is refused."""

    def __init__(self, repo_id: str, commit: str, file: RepoFile) -> None:
        self.repo_id, self.commit, self.file = repo_id, commit, file

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if not len(buffer):
            return
        try:
            retried(lambda: self._get(buffer, offset), may_pass)
        except CheckpointError:
            raise
        except Exception as error:  # whatever the layers below raise
            hint = _LATER if may_pass(error) else None
            raise CheckpointError(
                f"cannot read `{self.file.path}` of `{self.repo_id}`: {reason_of(error)}", hint=hint
            ) from error

    def _get(self, buffer: memoryview, offset: int) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        last = offset + len(buffer) - 1
        url = hf_hub_url(self.repo_id, self.file.path, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            whole = answer.status_code == 200 and (offset, len(buffer)) == (0, self.file.nbytes)
            said = answer.headers.get("Content-Range", "the whole file")
            if not whole and not (answer.status_code == 206 and said.startswith(f"bytes {offset}-{last}/")):
                raise self._refusal(offset, last, f"`{said}`")
            done = 0
            for part in answer.iter_raw():
                if done + len(part) > len(buffer):
                    raise self._refusal(offset, last, "more")
                buffer[done : done + len(part)] = part
                done += len(part)
        if done < len(buffer):
            raise self._refusal(offset, last, f"{done} bytes")

    def _refusal(self, offset: int, last: int, found: str) -> CheckpointError:
        where = f"`{self.file.path}` of `{self.repo_id}`"
        return CheckpointError(
            f"cannot read {where}: asked for bytes {offset}-{last}, the Hub or a proxy before it sent {found}"
        )

    def version(self) -> Version:
        return self.file.version or Version(self.file.nbytes)

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        return None


_T = TypeVar("_T")
_LATER = "the Hub or the way to it is in trouble: give the same command again later"
# Seconds before each further attempt; a server's Retry-After counts instead, up to MAX_WAIT_SECONDS.
WAITS = (1.0, 2.0, 4.0, 8.0)
MAX_WAIT_SECONDS = 60.0
_PASSING = {408, 429, 500, 502, 503, 504}


def retried(call: Callable[[], _T], passes: Callable[[Exception], object]) -> _T:
    """What `call` returns; called again, after a while, when it fails and `passes` says that this may pass."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # whatever the layers below raise
            if not passes(error):
                raise
            time.sleep(_asked_to_wait(error) or wait)
    return call()


def status_of(error: Exception) -> int | None:
    """The status of an answer that says that the Hub is busy or in trouble; None for every other error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if status in _PASSING else None


# Of httpx and, beneath it, of the system: the request got no answer.
_NO_ANSWER = ("TransportError", "OfflineModeIsEnabled", "ConnectionError", "gaierror")


def is_unreachable(error: Exception) -> bool:
    return any(kind.__name__ in _NO_ANSWER for kind in type(error).__mro__)


def may_pass(error: Exception) -> bool:
    """Busy, or a connection that broke: an error of the network, with no answer, of a Hub that did answer before."""
    answered = getattr(error, "response", None) is not None
    return status_of(error) is not None or not (answered or isinstance(error, CheckpointError))


def _asked_to_wait(error: Exception) -> float | None:
    text = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(text), MAX_WAIT_SECONDS) if text.isdecimal() else None
