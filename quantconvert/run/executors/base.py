"""What an executor is, the registry of executors, and what they are given. Imports no torch.

To add one: a class with `name` and `run`, and a line in EXECUTORS. A `Build` can be pickled, so that tasks can be
carried out in other processes (`quantconvert.run.executors.carry`), which send results back for the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantconvert.checkpoint import Repo
from quantconvert.errors import UsageError
from quantconvert.events import Reporter
from quantconvert.planning import Plan
from quantconvert.run.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Build:
    """A plan, where its source is, and the folder in which the partial files of its shards are."""

    plan: Plan
    source: Repo
    folder: Path


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


def _threads() -> Executor:
    from quantconvert.run.executors.threads import Threads

    return Threads()


EXECUTORS: dict[str, Callable[[], Executor]] = {"threads": _threads}


def check_executor(name: str) -> None:
    """Raise `UsageError`, with what there is, for a name that nobody registered."""
    if name not in EXECUTORS:
        raise UsageError(f"executor: expected {', '.join(EXECUTORS)}, got `{name}`")


def get_executor(name: str) -> Executor:
    """The executor of that name; raises `UsageError` as `check_executor` does."""
    check_executor(name)
    return EXECUTORS[name]()
