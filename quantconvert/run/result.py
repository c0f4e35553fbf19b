"""What carrying out one task gives beside bytes on disk."""

from __future__ import annotations

from typing import NamedTuple

# Checksums of a task's outputs, hexadecimal sha256, in the order of `Task.outputs`; none for a copy.
Checksums = tuple[str, ...]


class TaskResult(NamedTuple):
    """The checksums of what a task wrote, and sums of squares of a quantized weight's error and of the weight."""

    sums: Checksums
    noise: tuple[float, float] | None = None
