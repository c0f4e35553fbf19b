"""What the library tells while it works. It never prints: the command line is one `Reporter`, tests are others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Started:
    """Work begins: how many tasks (or tensors to check), how many bytes they read, and the word for what is done.

    num_layers: how many numbered layers they are of. Torch is imported, and what lies on the Hub downloaded, after it.
    """

    num_tasks: int
    source_nbytes: int
    word: str = "converting"
    num_layers: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """`nbytes` more of the source's bytes are done; `name` is the source tensor they belong to."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardWritten:
    """One output file is complete and on disk."""

    file: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know that is no error; `topic` groups notes of one kind."""

    topic: str
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything is in place under its final name."""

    out: str


Event = Started | Progress | ShardWritten | Note | Finished


class Reporter(Protocol):
    """Receives events, from any thread, one at a time."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event) -> None:
    """The reporter that ignores everything."""
