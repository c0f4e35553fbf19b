"""Which rows of a weight are looked at. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantconvert.sources import Read
from quantconvert.spans import spans

# Rows that are read at once: neighbours cost one read, and what is stored transposed is read in strips.
RUN_ROWS, TURNED_ROWS = 8, 64
# Elements that a run holds at most, and about as many where all rows are looked at.
RUN_ELEMENTS, WHOLE_ELEMENTS = 1 << 18, 1 << 15


@dataclass(frozen=True, slots=True)
class Sample:
    """Runs of neighbouring rows, evenly spaced; where they are all rows, the last may be shorter."""

    rows: int
    run: int
    runs: int

    @property
    def count(self) -> int:
        """All of its rows."""
        return min(self.rows, self.runs * self.run)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each run, half-open."""
        if self.runs * self.run >= self.rows:
            yield from spans(0, self.rows, self.run)
            return
        for i in range(self.runs):
            begin = i * (self.rows - self.run) // max(1, self.runs - 1)
            yield begin, begin + self.run


def sample(read: Read, count: int) -> Sample:
    """`count` rows of a weight, or a few more."""
    rows, columns = read.matrix
    run = TURNED_ROWS if read.view.transposed else RUN_ROWS
    run = max(1, min(run, count, RUN_ELEMENTS // max(1, columns)))
    if run * -(-count // run) >= rows:
        run = max(run, min(rows, WHOLE_ELEMENTS // max(1, columns)))
        count = rows
    return Sample(rows, run, -(-count // run))


def slab_nbytes(read: Read) -> int:
    """Room for one run of rows where they are stored transposed."""
    return TURNED_ROWS * 4 * read.matrix[1]
