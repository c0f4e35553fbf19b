"""A source that is not on this machine, as if it were: ranges of its files come when they are needed, and go.

Each lies at its own offset in a sparse file of the true size, so that everything that reads a source reads it as ever;
when the last that needs it is done, its room is given back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from quantconvert import machine
from quantconvert.checkpoint import Repo, RepoFile
from quantconvert.checkpoint.contents import Download
from quantconvert.checkpoint.ranges import LocalReader, RangeReader, RemoteReader, Version
from quantconvert.errors import OutputError
from quantconvert.run.disk import write_all
from quantconvert.run.spool.schedule import BLOCK_NBYTES, FETCH_NBYTES, Books, Schedule
from quantconvert.run.spool.wants import Items

CONNECTIONS = 8
POLL_SECONDS = 0.2
# A request that hangs is left to itself when a run ends.
PATIENCE_SECONDS = 1.5


class Stopped(Exception):
    """The run has ended."""


class Hold(Protocol):
    """What a pass over items says of them, in any order that begins with the first ones."""

    def need(self, item: int) -> None:
        """Wait until all that the item reads is there; raises what fetching it raised."""
        ...

    def done(self, item: int) -> None:
        """It has read all that it will."""
        ...


class Here:
    """Of a source that is on this machine."""

    def need(self, item: int) -> None:
        return None

    def done(self, item: int) -> None:
        return None


@contextmanager
def holding(source: Repo, items: Callable[[], Items], pulse: Callable[[], None] = lambda: None) -> Iterator[Hold]:
    """What a pass over `items` has to say while it reads `source`. pulse: called while it waits, may raise."""
    if not isinstance(source, Spool):
        yield Here()
        return
    fetcher = Fetcher(source, Schedule(items(), source.punches), pulse)
    try:
        fetcher.start()
        yield fetcher
    finally:
        fetcher.stop()


def direct(source: Repo) -> Repo:
    """The source itself, for what reads it in an order that nobody knows ahead."""
    return source.remote if isinstance(source, Spool) else source


class SpoolReader(LocalReader):
    """A file of which only what was asked for is there; its version is that of the file that it stands for."""

    def __init__(self, path: Path, file: RepoFile) -> None:
        super().__init__(path, file.path)
        self._version = file.version or Version(file.nbytes)

    def version(self) -> Version:
        return self._version


class Spool:
    """`remote` as a `Repo` whose files of weights are on this machine as far as they are needed.

    folder: for the sparse files. limit: bytes of them on the disk at once, unless one item needs more.
    """

    def __init__(self, remote: Repo, files: Sequence[RepoFile], folder: Path, limit: int) -> None:
        self.remote, self.folder, self.limit = remote, folder, limit
        self._files = {file.path: (number, file) for number, file in enumerate(files)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                with open(self.path(file.path), "wb") as sparse:
                    sparse.truncate(file.nbytes)
            self.punches = machine.can_punch(folder)
        except OSError as error:
            raise OutputError(f"cannot write in `{folder}`: {error.strerror}") from error

    def path(self, file: str) -> Path:
        return self.folder / f"{self._files[file][0]:05}"

    def size(self, file: str) -> int:
        return self._files[file][1].nbytes

    @property
    def location(self) -> str:
        return self.remote.location

    @property
    def revision(self) -> str | None:
        return self.remote.revision

    def files(self) -> tuple[RepoFile, ...]:
        return self.remote.files()

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return self.remote.read(path, offset, nbytes)

    def open(self, path: str) -> RangeReader:
        if path not in self._files:
            return self.remote.open(path)
        return SpoolReader(self.path(path), self._files[path][1])

    def prepare(self, paths: tuple[str, ...]) -> None:
        return None

    def download(self, paths: tuple[str, ...]) -> Download | None:
        return None

    def materialize(self, paths: tuple[str, ...]) -> Path:
        return self.remote.materialize(paths)

    def remove(self) -> None:
        """Give back all room."""
        for file in self._files:
            self.path(file).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


class Fetcher:
    """One pass: threads that fetch segments in order, as far ahead as there is room.

    All that an item needs is let in before anything of the next, and the first that is not done is let in always, so
    that nobody waits for ever.
    """

    def __init__(self, spool: Spool, schedule: Schedule, pulse: Callable[[], None]) -> None:
        self.spool, self.schedule, self.pulse = spool, schedule, pulse
        self._books, self._held, self._cursor = Books(schedule), 0, 0
        self._here, self._live = set[int](), set[int]()
        self._done, self._oldest = set[int](), 0
        self._error: BaseException | None = None
        self._stop = False
        self._changed = threading.Condition()
        self._fds: dict[str, int] = {}
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(CONNECTIONS)]
        self._neighbours = _neighbours(schedule)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; descriptors into which a hanging request may still write are left open."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(PATIENCE_SECONDS / len(self._threads))
        if not any(thread.is_alive() for thread in self._threads):
            for number in self._live:
                self._punch(number, self._live - {number})
            for fd in self._fds.values():
                os.close(fd)

    def need(self, item: int) -> None:
        wanted = set(self.schedule.of[item])
        with self._changed:
            while not wanted <= self._here:
                if self._error is not None:
                    raise self._error
                if self._stop:
                    raise Stopped
                self._changed.wait(POLL_SECONDS)
                self.pulse()

    def done(self, item: int) -> None:
        with self._changed:
            self._done.add(item)
            while self._oldest in self._done:
                self._oldest += 1
            for number in self.schedule.of[item]:
                for gone in self._books.use(number):
                    self._held -= self.schedule.segments[gone].room
                    self._live.discard(gone)
                    self._punch(gone, self._live)
            self._changed.notify_all()

    def _work(self) -> None:
        while (numbers := self._next()) is not None:
            try:
                self._fetch(numbers)
            except Stopped:
                return
            except BaseException as error:  # raised by those who wait
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._here.update(numbers)
                self._changed.notify_all()

    def _next(self) -> Sequence[int] | None:
        """Segments, one behind the other in a file, that are to be fetched now by one request; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._has_room(0))
            if self._is_over:
                return None
            found: list[int] = []
            while self._cursor < len(self.schedule.segments) and self._has_room(len(found)):
                segment = self.schedule.segments[self._cursor]
                if found and not self._goes_on(self.schedule.segments[found[0]], found[-1]):
                    break
                found.append(self._cursor)
                self._live.add(self._cursor)
                self._held += segment.room
                self._cursor += 1
            return found

    @property
    def _is_over(self) -> bool:
        return self._stop or self._error is not None or self._cursor == len(self.schedule.segments)

    def _has_room(self, taken: int) -> bool:
        """Whether the next segment may come; what the oldest item needs may always, as the first of a request."""
        room = self.schedule.segments[self._cursor].room
        return self._held + room <= self.spool.limit or (
            not taken and self.schedule.first[self._cursor] <= self._oldest
        )

    def _goes_on(self, first: tuple[str, int, int], last: int) -> bool:
        """Whether the next segment begins where `last` ends, and one request still takes it."""
        following = self.schedule.segments[self._cursor]
        before = self.schedule.segments[last]
        return (following.file, following.begin) == (before.file, before.end) and (
            following.end - first[1] <= FETCH_NBYTES
        )

    def _fetch(self, numbers: Sequence[int]) -> None:
        first, last = self.schedule.segments[numbers[0]], self.schedule.segments[numbers[-1]]
        fd = self._fd(first.file)

        def take(data: bytes, at: int) -> None:
            if self._stop:
                raise Stopped
            try:
                write_all(fd, memoryview(data), at)
            except OSError as error:
                raise OutputError(f"cannot keep `{first.file}` in `{self.spool.folder}`: {error.strerror}") from error

        reader = self.spool.remote.open(first.file)
        assert isinstance(reader, RemoteReader), first.file
        reader.fetch(first.begin, last.end - first.begin, take)

    def _fd(self, file: str) -> int:
        with self._changed:
            if file not in self._fds:
                self._fds[file] = os.open(self.spool.path(file), os.O_RDWR | os.O_CLOEXEC)
            return self._fds[file]

    def _punch(self, number: int, live: set[int]) -> None:
        """Give back the room of a segment, and of blocks that it shares with others that are gone."""
        file, begin, end = self.schedule.segments[number]
        if file not in self._fds:
            return
        before, after = self._neighbours[number]
        if not any(other in live for other in before):
            begin = begin // BLOCK_NBYTES * BLOCK_NBYTES
        if not any(other in live for other in after):
            end = -(-end // BLOCK_NBYTES) * BLOCK_NBYTES
        if self.spool.punches:
            machine.punch(self._fds[file], begin, end - begin)
        elif not any(self.schedule.segments[other].file == file for other in live):
            os.ftruncate(self._fds[file], 0)
            os.ftruncate(self._fds[file], self.spool.size(file))


def _neighbours(schedule: Schedule) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each segment those before and behind it that have bytes in its first and its last block."""
    order = sorted(range(len(schedule.segments)), key=lambda number: schedule.segments[number][:2])
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * len(order)
    blocks: dict[tuple[str, int], list[int]] = {}
    for number in order:
        file, begin, end = schedule.segments[number]
        for block in {begin // BLOCK_NBYTES, (end - 1) // BLOCK_NBYTES}:
            blocks.setdefault((file, block), []).append(number)
    for number in order:
        file, begin, end = schedule.segments[number]
        low = tuple(n for n in blocks[file, begin // BLOCK_NBYTES] if n != number)
        high = tuple(n for n in blocks[file, (end - 1) // BLOCK_NBYTES] if n != number)
        found[number] = low, high
    return found
