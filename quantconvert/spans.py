"""Ranges of rows and bytes."""

from __future__ import annotations

from collections.abc import Iterator


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most `step` that cover start..stop."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
