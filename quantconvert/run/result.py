"""What carrying out a task, or a part of one, gives beside bytes on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Checksums of a task's outputs (`run.pieces.Sums.text`), in the order of `Task.outputs`; none for a copy.
Checksums = tuple[str, ...]


class TaskResult(NamedTuple):
    """The checksums of what a task wrote, and sums of squares of a quantized weight's error and of the weight.

    seen: whether a witness has compared it with the source.
    """

    sums: Checksums
    noise: tuple[float, float] | None = None
    seen: bool = False


class Done(NamedTuple):
    """What a part of a task gave: by suffix the sums of the pieces that it wrote, and the noise of each tile."""

    sums: Mapping[str, int]
    noise: Sequence[float] = ()
    signal: Sequence[float] = ()
