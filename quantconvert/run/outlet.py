"""Where complete shards go when they do not stay on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from quantconvert.checkpoint.ranges import Files
from quantconvert.factors import FACTORS, IMPORTANCES
from quantconvert.planning import Plan
from quantconvert.run.result import TaskResult
from quantconvert.run.shards import ShardWriter


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


# What the first pass leaves in the hidden folder of a conversion.
FIRST = (FACTORS, IMPORTANCES)


class Shipped(NamedTuple):
    """A shard that is where it goes: its sha256, what its tasks gave, by their numbers in the plan, and the sum of what
    the first pass had found for them.
    """

    sha256: str
    results: Mapping[int, TaskResult]
    basis: str = ""


class Sending(NamedTuple):
    """An outlet, what it has, and the sum of what the first pass has found."""

    outlet: Outlet
    shipped: Mapping[int, Shipped]
    basis: str


class Witness(Protocol):
    """Compares what tasks have written with the source, while that is at hand."""

    def see(self, index: int, theirs: Files, writer: ShardWriter) -> bool:
        """Whether what the task has written is right. Called by any thread, behind the task's last byte."""
        ...


class Outlet(Protocol):
    """Takes shards, and shows all of a result at once. Used by one thread at a time."""

    def begin(self, plan: Plan, restart: bool) -> Mapping[int, Shipped]:
        """What an earlier run of the same plan has sent, by numbers of shards; restart: which is to be forgotten."""
        ...

    def recall(self, folder: Path) -> None:
        """Bring into `folder` what the first pass of another process has found for this plan, if it is there."""
        ...

    def keep(self, folder: Path) -> None:
        """Have what the first pass has left in `folder` for others."""
        ...

    @property
    def pause(self) -> float:
        """Seconds until it takes the next shards."""
        ...

    def ship(self, folder: Path, shards: Mapping[int, Shipped]) -> None:
        """Take these shards of `folder`; when it returns they may be removed there."""
        ...

    def show(self, folder: Path, small: Sequence[str], weights: Mapping[str, str]) -> Published:
        """Make all visible: files of `folder`, and weights that were shipped, by path with their sha256."""
        ...
