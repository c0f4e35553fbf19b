"""What is fetched when, and how much of it lies on the disk at once: known from the headers, before a byte comes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from quantconvert.run.spool.wants import Items
from quantconvert.spans import spans

# Most that one request fetches, and the unit in which file systems give room back.
FETCH_NBYTES, BLOCK_NBYTES = 64_000_000, 4096


class Segment(NamedTuple):
    """Bytes of a file that are all needed by the same items, so that they come and go together."""

    file: str
    begin: int
    end: int

    @property
    def room(self) -> int:
        """What it takes on a disk."""
        return -(-self.end // BLOCK_NBYTES) * BLOCK_NBYTES - self.begin // BLOCK_NBYTES * BLOCK_NBYTES


class Schedule:
    """Segments in the order in which `items` need them first.

    of: the numbers of the segments that an item needs. uses: how many items need a segment. first: the first of them.
    punches: whether the disk gives back parts of a file; else a file stays until the last of its segments is done.
    """

    def __init__(self, items: Items, punches: bool = True) -> None:
        self.segments: list[Segment] = []
        self.of: list[tuple[int, ...]] = []
        self.first: list[int] = []
        self.punches = punches
        edges, numbers = _edges(items), dict[tuple[str, int], int]()
        for item, wants in enumerate(items):
            found: list[int] = []
            for file, begin, end in wants:
                cuts = edges.get(file, [])
                for i in range(bisect_left(cuts, begin), bisect_left(cuts, end)):
                    number = numbers.setdefault((file, cuts[i]), len(self.segments))
                    if number == len(self.segments):
                        self.segments.append(Segment(file, cuts[i], cuts[i + 1]))
                        self.first.append(item)
                    found.append(number)
            self.of.append(tuple(dict.fromkeys(found)))
        self.uses = Counter(number for numbers_ in self.of for number in numbers_)

    def least(self) -> int:
        """Room that it takes where each item waits for the one before: no less will do."""
        held = most = 0
        books, there = Books(self), set[int]()
        for numbers in self.of:
            for number in numbers:
                if number not in there:
                    there.add(number)
                    held += self.segments[number].room
            most = max(most, held)
            for number in numbers:
                held -= sum(self.segments[gone].room for gone in books.use(number))
        return most

    @property
    def nbytes(self) -> int:
        """All that comes over the network."""
        return sum(segment.end - segment.begin for segment in self.segments)


class Books:
    """Which segments are still needed."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self._left = schedule, dict(schedule.uses)
        self._of_file = Counter(segment.file for segment in schedule.segments)
        self._waiting: dict[str, list[int]] = {}

    def use(self, number: int) -> Iterator[int]:
        """An item has used a segment; yields the segments whose room that gives back."""
        self._left[number] -= 1
        if self._left[number]:
            return
        if self.schedule.punches:
            yield number
            return
        file = self.schedule.segments[number].file
        self._of_file[file] -= 1
        self._waiting.setdefault(file, []).append(number)
        if not self._of_file[file]:
            yield from self._waiting.pop(file)


def _edges(items: Items) -> dict[str, list[int]]:
    """Where segments begin and end, by file."""
    found: dict[str, set[int]] = {}
    for wants in items:
        for file, begin, end in wants:
            if end > begin:
                cuts = found.setdefault(file, set())
                cuts.add(begin)
                cuts.add(end)
                cuts.update(first for first, _ in spans(begin, end, FETCH_NBYTES))
    return {file: sorted(cuts) for file, cuts in found.items()}
