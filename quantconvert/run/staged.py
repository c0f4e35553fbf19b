"""Shards of one result that several processes make, on machines that share a folder.

Each process builds in a folder of its own and moves what is complete here, with what the command that finishes has to
know beside it: a shard that two have made is there once, as its bytes are the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from quantconvert.errors import OutputError
from quantconvert.planning import Plan
from quantconvert.run.asked import ASKED, Asked
from quantconvert.run.disk import fsync_folder, write_file, write_whole
from quantconvert.run.journal import Journal
from quantconvert.run.outlet import FIRST, Published, Shipped
from quantconvert.run.result import TaskResult
from quantconvert.run.sidecar import check_job, job_bytes, read_sidecar, sidecar_bytes

JOB = "job.json"


def staging_folder(out: Path) -> Path:
    """Where the shards of the result `out` are gathered: beside it, where nobody takes it for a model."""
    return out.with_name(f".{out.name}.shards")


class FolderOutlet:
    """An `Outlet` that moves shards into a folder that several processes fill."""

    def __init__(self, folder: Path, asked: Asked | None = None) -> None:
        self.folder, self._asked = folder, asked
        self._plan: Plan | None = None

    def begin(self, plan: Plan, restart: bool) -> Mapping[int, Shipped]:
        """What is there of the plan; raises `OutputError` where it is of another."""
        self._plan, job = plan, self.folder / JOB
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not job.exists():
                write_whole(job, job_bytes(plan))
            check_job(job.read_bytes(), plan, f"`{self.folder}`", "give the source and options of before, or remove it")
            if self._asked is not None and not (self.folder / ASKED).exists():
                write_whole(self.folder / ASKED, self._asked.content(plan.checkpoint.revision))
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot use `{self.folder}`: {error}") from error
        return {number: done for number in range(len(plan.shards)) if (done := self.shipped(plan, number)) is not None}

    def shipped(self, plan: Plan, number: int) -> Shipped | None:
        """What is known of a shard that is there whole."""
        shard = plan.shards[number]
        try:
            if (self.folder / shard.file).stat().st_size != shard.nbytes:
                return None
            return read_sidecar(_beside(self.folder / shard.file).read_bytes(), plan, number)
        except OSError:
            return None

    def recall(self, folder: Path) -> None:
        for name in FIRST:
            if (self.folder / name).is_file():
                _copy(self.folder / name, folder / name)

    def keep(self, folder: Path) -> None:
        for name in FIRST:
            if (folder / name).is_file() and not (self.folder / name).exists():
                _copy(folder / name, self.folder / name)

    @property
    def pause(self) -> float:
        return 0.0

    def ship(self, folder: Path, shards: Mapping[int, Shipped]) -> None:
        assert self._plan
        try:
            for number, done in shards.items():
                file = self._plan.shards[number].file
                (folder / file).replace(self.folder / file)
                write_file(_beside(self.folder / file), sidecar_bytes(file, done))
            fsync_folder(self.folder)
        except OSError as error:
            raise OutputError(f"cannot move a shard into `{self.folder}`: {error.strerror}") from error

    def show(self, folder: Path, small: Sequence[str], weights: Mapping[str, str]) -> Published:
        raise NotImplementedError  # the command that finishes adopts what is here


def gathered(out: Path) -> FolderOutlet | None:
    """Where other processes have gathered shards of `out`; None where they have not."""
    outlet = FolderOutlet(staging_folder(out))
    return outlet if (outlet.folder / JOB).is_file() else None


def adopt(plan: Plan, outlet: FolderOutlet, shards: Mapping[int, Shipped], state: Path, journal: Journal) -> None:
    """Take these shards, which other processes have gathered, into the hidden folder `state`: the ledger proves their
    bytes as it does those of an interrupted run.
    """
    entries: list[tuple[int, TaskResult]] = []
    for number, done in shards.items():
        file = plan.shards[number].file
        try:
            (outlet.folder / file).replace(state / file)
        except OSError as error:
            raise OutputError(f"cannot take `{file}` from `{outlet.folder}`: {error.strerror}") from error
        entries += sorted(done.results.items())
    if entries:
        journal.append(entries)


def remove_staging(out: Path) -> None:
    """What is left when the result is in place."""
    with suppress(OSError):
        shutil.rmtree(staging_folder(out))


def _copy(source: Path, target: Path) -> None:
    try:
        write_whole(target, source.read_bytes())
    except OSError as error:
        raise OutputError(f"cannot copy `{source}` to `{target}`: {error.strerror}") from error


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")
