"""Results to the Hub: shard by shard to a staging branch, then one commit that shows all of it at once.

The staging branch is named after the result, so that it is the journal: the same command, on another machine too, sends
what is not there yet. A repository never lists a config without its weights. Uncommitted uploads are collected by the
Hub, so that each shard is committed as soon as it is sent. Tokens are huggingface_hub's, from the environment or its
login, and never an argument here. With `quantconvert.hub` the only import of huggingface_hub.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantconvert.checkpoint import LocalFolder, RepoFile, load_checkpoint
from quantconvert.checkpoint.files import is_stale
from quantconvert.errors import CheckpointError, OutputError, UnsupportedError
from quantconvert.events import Note, Reporter, silent
from quantconvert.hub import HubReader, answered, is_unreachable, reason_of, retried, status_of
from quantconvert.planning import Plan
from quantconvert.run.disk import write_file
from quantconvert.run.outlet import FIRST, Published, Shipped
from quantconvert.run.sidecar import check_job, job_bytes, read_sidecar, sidecar_bytes
from quantconvert.verification.report import read_report

T = TypeVar("T")
MAIN = "main"
# Beside the shards on a staging branch: which conversion they are of, and what each one's tasks gave.
BESIDE = ".quantconvert"
PREFIX = "quantconvert-"
# Between two commits to a staging branch: a repository takes so many commits an hour.
STAGE_SECONDS = 60.0
MAX_SIDECAR_NBYTES = 50_000_000


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
    content = _report(folder)
    weights = {file.path: content["files"][file.path] for file in load_checkpoint(LocalFolder(folder)).weight_files}
    staging = Staging(target, report)
    there = staging.open(content["sha256"], restart=False)
    missing = [path for path, sha256 in weights.items() if there.get(path) != sha256]
    for count, path in enumerate(missing):
        report(Note("push", f"{path} ({count + 1} of {len(missing)}) to {target.repo_id}, branch {staging.name}"))
        staging.send(folder, [path], {})
    return staging.show(folder, [*content["files"], "quantconvert.json"], weights)


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


class Staging:
    """One result on its way: an `Outlet` of conversions, and what `publish` sends a finished folder by."""

    def __init__(self, target: Target, report: Reporter = silent) -> None:
        from huggingface_hub import HfApi

        self.target, self.report, self.api = target, report, HfApi()
        _hide_bars()
        self.name = self._head = ""
        self._plan: Plan | None = None
        self._sent: dict[str, int] = {}
        self._there: Mapping[str, str | None] = {}
        self._next = 0.0

    def open(self, digest: str, restart: bool) -> Mapping[str, str | None]:
        """The staging branch of a result, made where there is none: what it holds, by path, with sha256 of large files.

        From now on the branch that shows the result must not move.
        """
        api, repo_id = self.api, self.target.repo_id
        self.name = PREFIX + digest[:12]
        self._asked(lambda: api.create_repo(repo_id, private=self.target.private or None, exist_ok=True))
        self._head = self._find_head()
        branches = [branch.name for branch in self._asked(lambda: api.list_repo_refs(repo_id)).branches]
        others = [name for name in branches if name.startswith(PREFIX) and name != self.name]
        if others:
            self.report(Note("push", f"`{repo_id}` has parts of other results, on branches {', '.join(others)}"))
        if restart and self.name in branches:
            self._asked(lambda: api.delete_branch(repo_id, branch=self.name))
        self._asked(lambda: api.create_branch(repo_id, branch=self.name, revision=self._head, exist_ok=True))
        return self._sums(self.name)

    def _find_head(self) -> str:
        """The commit of the branch now; the branch is made where it is another than main, and new."""
        api, branch = self.api, self.target.branch
        if branch != MAIN:
            self._asked(lambda: api.create_branch(self.target.repo_id, branch=branch, exist_ok=True))
        sha = self._asked(lambda: api.model_info(self.target.repo_id, revision=branch).sha)
        assert sha
        return sha

    def _sums(self, revision: str) -> dict[str, str | None]:
        """sha256 of each large file of a revision, None of others."""
        api, repo_id = self.api, self.target.repo_id
        tree = self._asked(lambda: list(api.list_repo_tree(repo_id, revision=revision, recursive=True)))
        return {entry.path: entry.lfs.sha256 if entry.lfs else None for entry in tree if hasattr(entry, "lfs")}

    def begin(self, plan: Plan, restart: bool) -> Mapping[int, Shipped]:
        """The shards that the staging branch holds of a plan; raises `OutputError` where it is of another."""
        there = self._there = self.open(plan.digest, restart)
        self._plan, job = plan, f"{BESIDE}/job.json"
        if job not in there:
            self._commit({job: job_bytes(plan)}, "Begin")
            return {}
        commit = self._commit_of_branch()
        where = f"branch `{self.name}` of `{self.target.repo_id}`"
        check_job(self._read(job, commit), plan, where, "--restart starts over")
        shipped: dict[int, Shipped] = {}
        for number, shard in enumerate(plan.shards):
            if (sha256 := there.get(shard.file)) and _sidecar(shard.file) in there:
                done = read_sidecar(self._read(_sidecar(shard.file), commit), plan, number)
                if done is not None and done.sha256 == sha256:
                    shipped[number] = done
        return shipped

    def _read(self, path: str, commit: str) -> bytes:
        """A small file of the staging branch."""
        repo_id = self.target.repo_id
        try:
            (info,) = self.api.get_paths_info(repo_id, [path], revision=commit)
            size = getattr(info, "size", 0)
            if size > MAX_SIDECAR_NBYTES:
                raise OutputError(f"`{path}` of `{repo_id}` is too large: {size} bytes", hint="--restart starts over")
            content = bytearray(size)
            HubReader(repo_id, commit, RepoFile(path, size)).read_into(memoryview(content), 0)
            return bytes(content)
        except (CheckpointError, ValueError) as error:
            raise OutputError(f"cannot read `{path}` of `{repo_id}`: {reason_of(error)}") from error

    def recall(self, folder: Path) -> None:
        for name in FIRST:
            if f"{BESIDE}/{name}" in self._there:
                content = self._read(f"{BESIDE}/{name}", self._commit_of_branch())
                try:
                    write_file(folder / name, content)
                except OSError as error:
                    raise OutputError(f"cannot write `{folder / name}`: {error.strerror}") from error

    def keep(self, folder: Path) -> None:
        there = [name for name in FIRST if (folder / name).is_file() and f"{BESIDE}/{name}" not in self._there]
        if there:
            self._commit({f"{BESIDE}/{name}": folder / name for name in there}, "Keep what the first pass has found")

    def _commit_of_branch(self) -> str:
        commit = self._asked(lambda: self.api.model_info(self.target.repo_id, revision=self.name).sha)
        assert commit
        return commit

    @property
    def pause(self) -> float:
        return max(0.0, self._next - time.monotonic())

    def ship(self, folder: Path, shards: Mapping[int, Shipped]) -> None:
        assert self._plan
        files = {number: self._plan.shards[number].file for number in shards}
        beside = {_sidecar(files[number]): sidecar_bytes(files[number], done) for number, done in shards.items()}
        names = ", ".join(files.values())
        self.report(Note("push", f"{names} to {self.target.repo_id}, branch {self.name}"))
        self.send(folder, list(files.values()), beside)
        self._next = time.monotonic() + float(os.environ.get("QUANTCONVERT_STAGE_SECONDS") or STAGE_SECONDS)

    def send(self, folder: Path, files: Sequence[str], beside: Mapping[str, bytes]) -> None:
        """Files of `folder` and contents beside them, as one commit to the staging branch."""
        self._commit({file: folder / file for file in files} | dict(beside), f"Stage {', '.join(files)}")
        self._sent |= {file: (folder / file).stat().st_size for file in files}

    def _commit(self, contents: Mapping[str, Path | bytes], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        def commit() -> None:
            adds = [CommitOperationAdd(path, content) for path, content in contents.items()]
            self.api.create_commit(self.target.repo_id, adds, commit_message=message, revision=self.name)

        self._asked(commit, also=(409, 412))  # others may commit to the branch at the same time

    def show(self, folder: Path, small: Sequence[str], weights: Mapping[str, str]) -> Published:
        """One commit, whose parent is the head that was seen: weights by copies on the server, the rest with it, and
        what an older result has that this one has not is deleted.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        target, names = self.target, {*small, *weights}

        def commit() -> Any:
            old = self._sums(target.branch)  # each time: an answer that was lost may have been to a commit that is made
            adds = [CommitOperationAdd(name, folder / name) for name in small if name not in weights]
            copies = [CommitOperationCopy(name, name, src_revision=self.name) for name in weights]
            deletes = [CommitOperationDelete(name) for name in old if is_stale(name) and name not in names]
            return self.api.create_commit(
                target.repo_id,
                [*copies, *adds, *deletes],
                commit_message="Upload what quantconvert made",
                revision=target.branch,
                parent_commit=self._head,
                create_pr=target.create_pr,
            )

        info = self._asked(commit)
        self._asked(lambda: self.api.delete_branch(target.repo_id, branch=self.name))
        url = info.pr_url or info.commit_url
        return Published(target.repo_id, info.oid, url, len(self._sent), sum(self._sent.values()))

    def _asked(self, call: Callable[[], T], also: Sequence[int] = ()) -> T:
        """What the Hub answers, asked again where that may help; else one sentence with the next step."""
        repo_id, branch = self.target.repo_id, self.target.branch
        try:
            return retried(call, lambda e: status_of(e) is not None or is_unreachable(e) or answered(e) in also)
        except Exception as error:  # whatever the layers below raise
            hints = {
                401: "run `hf auth login`, or set HF_TOKEN to a token that may write",
                403: f"the token may not write to `{repo_id}`: another one, or another repository",
                404: "check the spelling of the repository and of its owner",
                412: f"`{branch}` has moved since this run began; what was sent is kept: the same command again, "
                "--branch NAME or --create-pr",
            }
            later = "check the network; the same command continues"
            hint = later if status_of(error) or is_unreachable(error) else hints.get(answered(error) or 0)
            raise OutputError(f"the Hub does not take it for `{repo_id}`: {reason_of(error)}", hint=hint) from error


def _hide_bars() -> None:
    """No bars of huggingface_hub's among our own lines, unless its environment variable asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


def _sidecar(file: str) -> str:
    return f"{BESIDE}/{file}.json"
