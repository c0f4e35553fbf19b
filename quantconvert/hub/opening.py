"""From what the user names to a repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantconvert.checkpoint import LocalFolder, Repo, open_subfolder
from quantconvert.checkpoint.files import SINGLE_NAME, TORCH_NAME
from quantconvert.checkpoint.local import exists
from quantconvert.errors import CheckpointError, UsageError
from quantconvert.hub.buckets import open_bucket
from quantconvert.hub.repo import HubRepo, Unreachable

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PART = re.compile(r"-\d{1,6}-of-(\d{1,6})\.(safetensors|bin)$")


def open_repo(source: str | os.PathLike[str], revision: str | None, subfolder: str | None = None) -> Repo:
    """A local folder where one exists, what an address leads to, else a Hub repository where the name looks like one;
    or one folder inside it.

    Raises `CheckpointError` when it is neither.
    """
    repo = _open(source, revision)
    return repo if subfolder is None else open_subfolder(repo, subfolder)


def _open(source: str | os.PathLike[str], revision: str | None) -> Repo:
    text = os.fspath(source)
    if not text:
        raise UsageError("the source is empty: expected a folder or a Hub repository id")
    if "://" in text:
        return _addressed(text, revision)
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


def _is_whole(snapshot: Path) -> bool:
    """Whether a cached snapshot has its one file of weights, or as many as their names count."""
    names = {path.name for path in snapshot.iterdir()}
    if names & {SINGLE_NAME, TORCH_NAME}:
        return True
    parts = [match for match in map(_PART.search, names) if match]
    return bool(parts) and all(len(parts) == int(part[1]) for part in parts)


_HUB_URL = re.compile(r"(?:https?://[^/]*(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?([^/]+/[^/@?#]+).*")
_HF = re.compile(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?/?")


def _addressed(text: str, revision: str | None) -> Repo:
    """What lies behind an address: one of the Hub's own (`hf://org/model@revision`), a store's, or a local one."""
    kind = text.partition("://")[0].lower()
    if kind in ("http", "https") or (kind == "hf" and not _HF.fullmatch(text)):
        raise _url_error(text)
    if kind == "hf" and (match := _HF.fullmatch(text)):
        return _open(match[1], revision or match[2])
    if revision is not None:
        raise CheckpointError(f"--revision {revision} is for Hub repositories, `{text}` is none")
    return LocalFolder(Path(text.partition("://")[2]), text) if kind == "file" else open_bucket(text)


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
