"""A finished result to the Hub: shard by shard to a staging branch, then one commit that shows all of it at once.

The staging branch is named after the result, so that it is the journal: the same command, on another machine too, sends
what is not there yet. A repository never lists a config without its weights. Uncommitted uploads are collected by the
Hub, so that each shard is committed as soon as it is sent. Tokens are huggingface_hub's, from the environment or its
login, and never an argument here. With `quantconvert.hub` the only import of huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantconvert.checkpoint import LocalFolder, load_checkpoint
from quantconvert.checkpoint.files import is_stale
from quantconvert.errors import OutputError, UnsupportedError
from quantconvert.events import Note, Reporter, silent
from quantconvert.hub import is_unreachable, reason_of, retried, status_of
from quantconvert.verification.report import read_report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Published:
    """What became visible: the repository, the commit, its address (of a pull request where one was asked for), and how
    many files of weights were sent by this call.
    """

    repo_id: str
    commit: str
    url: str
    num_sent: int
    nbytes_sent: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where to: private counts where the repository is new; branch, or a pull request to it."""

    repo_id: str
    private: bool = False
    branch: str = MAIN
    create_pr: bool = False


def publish(folder: Path, target: Target, report: Reporter = silent) -> Published:
    """Send the result in `folder`, whose report says what belongs to it.

    Raises `UnsupportedError` where there is no report, `OutputError` for what the Hub refuses, with the next step.
    """
    from huggingface_hub import HfApi

    content = _report(folder)
    weights = {file.path: content["files"][file.path] for file in load_checkpoint(LocalFolder(folder)).weight_files}
    api, staging = HfApi(), f"quantconvert-{content['sha256'][:12]}"
    _asked(target, lambda: api.create_repo(target.repo_id, private=target.private or None, exist_ok=True))
    head = _head(api, target)
    _asked(target, lambda: api.create_branch(target.repo_id, branch=staging, revision=head, exist_ok=True))
    there = _sums(api, target.repo_id, staging)
    missing = [path for path, sha256 in weights.items() if there.get(path) != sha256]
    for count, path in enumerate(missing):
        report(Note("push", f"{path} ({count + 1} of {len(missing)}) to {target.repo_id}, branch {staging}"))
        _stage(api, target, staging, folder, path)
    info = _show(api, target, staging, head, folder, content["files"], weights)
    _asked(target, lambda: api.delete_branch(target.repo_id, branch=staging))
    nbytes = sum((folder / path).stat().st_size for path in missing)
    return Published(target.repo_id, info.oid, info.pr_url or info.commit_url, len(missing), nbytes)


def _report(folder: Path) -> dict[str, Any]:
    try:
        content = read_report(folder)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"the report of `{folder}` cannot be read: {error}") from error
    if content is None:
        raise UnsupportedError(
            f"`{folder}` has no quantconvert.json: nothing says which files belong to the result",
            hint="`hf upload` sends any folder",
        )
    return content


def _head(api: HfApi, target: Target) -> str:
    """The commit of the branch now; the branch is made where it is another than main, and new."""
    if target.branch != MAIN:
        _asked(target, lambda: api.create_branch(target.repo_id, branch=target.branch, exist_ok=True))
    sha = _asked(target, lambda: api.model_info(target.repo_id, revision=target.branch).sha)
    assert sha
    return sha


def _sums(api: HfApi, repo_id: str, revision: str) -> dict[str, str | None]:
    """sha256 of each large file of a revision, None of others."""
    tree = _asked(Target(repo_id), lambda: list(api.list_repo_tree(repo_id, revision=revision, recursive=True)))
    return {entry.path: entry.lfs.sha256 if entry.lfs else None for entry in tree if hasattr(entry, "lfs")}


def _stage(api: HfApi, target: Target, staging: str, folder: Path, path: str) -> None:
    from huggingface_hub import CommitOperationAdd

    def send() -> None:
        operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path)
        api.create_commit(target.repo_id, [operation], commit_message=f"Stage {path}", revision=staging)

    _asked(target, send)


def _show(
    api: HfApi,
    target: Target,
    staging: str,
    head: str,
    folder: Path,
    files: Mapping[str, str],
    weights: Mapping[str, str],
) -> Any:
    """One commit, whose parent is the head that was seen: weights by copies on the server, the rest with it, and what
    an older result has that this one has not is deleted.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    names = [*files, "quantconvert.json"]
    old = _sums(api, target.repo_id, target.branch)

    def commit() -> Any:
        adds = [CommitOperationAdd(name, folder / name) for name in names if name not in weights]
        copies = [CommitOperationCopy(name, name, src_revision=staging) for name in weights]
        deletes = [CommitOperationDelete(name) for name in old if is_stale(name) and name not in names]
        return api.create_commit(
            target.repo_id,
            [*copies, *adds, *deletes],
            commit_message="Upload what quantconvert made",
            revision=target.branch,
            parent_commit=head,
            create_pr=target.create_pr,
        )

    return _asked(target, commit)


def _asked(target: Target, call: Callable[[], T]) -> T:
    """What the Hub answers, asked again where that may help; else one sentence with the next step."""
    try:
        return retried(call, lambda error: status_of(error) is not None or is_unreachable(error))
    except Exception as error:  # whatever the layers below raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        hints = {
            401: "run `hf auth login`, or set HF_TOKEN to a token that may write",
            403: f"the token may not write to `{target.repo_id}`: another one, or another repository",
            404: "check the spelling of the repository and of its owner",
            412: f"`{target.branch}` has moved since this run began; what was sent is kept: the same command again, "
            "--branch NAME or --create-pr",
        }
        later = "check the network; the same command continues"
        hint = later if status_of(error) or is_unreachable(error) else hints.get(status or 0)
        raise OutputError(f"the Hub does not take it for `{target.repo_id}`: {reason_of(error)}", hint=hint) from error
