"""What an executor is, and what it is given. Imports no torch.

A `Build` can be pickled, so that tasks can be carried out in other processes (`quantconvert.run.executors.carry`),
which send results back for the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.events import Reporter
from quantconvert.factors import beside
from quantconvert.planning import Plan
from quantconvert.run.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Build:
    """A plan, where its source is, and the folder in which the partial files of its shards are."""

    plan: Plan
    source: Repo
    folder: Path

    def open_files(self) -> Files:
        """The source's files, what the first pass has left in the folder, and statistics."""
        statistics = self.plan.statistics
        return Files(self.source, beside(self.folder, statistics.path if statistics else None))


class Executor(Protocol):
    """A way to carry out tasks."""

    @property
    def name(self) -> str:
        """As `Limits.executor` names it."""
        ...

    def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
        """Carry out exactly `tasks`, numbers in `build.plan.tasks`, in any order and anywhere.

        Gives each result to `ledger.add` when its bytes are in the partial files, and calls `ledger.flush` from one
        thread whenever `ledger.due`. Reports the progress of source bytes. On an error it stops and raises it; what
        was added counts all the same. May be called from several threads: `add` and `report`.
        """
        ...
