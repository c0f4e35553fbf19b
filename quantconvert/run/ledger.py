"""What is done and what is left of a plan: proof of what an interrupted run wrote, durable progress, complete files.

An executor is given the tasks that `begin` returns and hands each result to `add`; one thread calls `flush` now and
then. A task counts as done once its bytes are synced and its line is in the journal; a file gets its name once all of
its tasks are done. Nothing here computes a byte.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from quantconvert import machine
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import OutputError
from quantconvert.events import Event, Note, Progress, Reporter, ShardWritten
from quantconvert.planning import Output, Plan, Task
from quantconvert.run.disk import fsync_folder
from quantconvert.run.hashing import Hashes
from quantconvert.run.journal import Journal
from quantconvert.run.outlet import Shipped, Witness
from quantconvert.run.part import ALL, Part
from quantconvert.run.partial import open_partial, read_back
from quantconvert.run.pieces import Sums, pieces_of
from quantconvert.run.result import TaskResult
from quantconvert.spans import spans

# Finished work is made durable once there is this much of it, or it is this old. Bounds what a kill costs, and, as a
# sync cannot be interrupted, how long an interrupted run takes to end.
FLUSH_NBYTES, FLUSH_SECONDS = 128_000_000, 1.0
# Workers pause while this much finished work waits for a disk that is slower than they are.
MAX_WAITING_NBYTES = 512_000_000
READ_NBYTES = 1 << 20


class Ledger:
    """The books of one run of `plan` in `folder`. `add` may be called by any thread, the rest by one."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        journal: Journal,
        report: Reporter,
        shipped: Mapping[int, Shipped] | None = None,
        witness: Witness | None = None,
        part: Part = ALL,
    ) -> None:
        self.plan, self.folder, self.journal, self.report = plan, folder, journal, report
        self.shipped, self.reopened = shipped or {}, set[int]()
        self.admit, self.completed, self.witness, self.part = _admitted, _left_alone, witness, part
        self.hashes, self.sums = Hashes(plan, folder), Sums()
        self.waiting_nbytes = 0
        self._waiting: list[tuple[int, TaskResult]] = []
        self._left = Counter(_shard(task) for task in plan.tasks)
        self._fds: dict[int, int] = {}
        self._named: set[int] = set()
        self._added: set[int] = set()
        self._complete: set[int] = set()
        self._flushed_at = time.monotonic()
        self._failed = False
        self._lock = threading.Lock()

    def begin(self, files: Files | None) -> tuple[int, ...]:
        """The numbers of the tasks that are to be done: those that the journal lacks, or whose bytes do not prove it.

        files: of the source, with which copies are compared; None where it has to be fetched again: copies are then
        made again. Raises `OutputError`, and `CheckpointError` for those.
        """
        for done in self.shipped.values():
            self.journal.done.update(done.results)
        journalled = {_shard(self.plan.tasks[index]) for index in self.journal.done}
        for shard, planned in enumerate(self.plan.shards):
            if shard in self.shipped:
                self._complete.add(shard)
            elif shard in journalled or (self.folder / planned.file).exists():  # a complete file is partial again
                self._fd(shard)
                self.reopened.add(shard)
        proven = self._prove(files)
        self.hashes.add(self.plan.tasks[index] for index in proven)
        for done in self.shipped.values():
            proven.update(done.results)
        self._added = set(proven)
        for index in proven:
            self._left[_shard(self.plan.tasks[index])] -= 1
        lost = {index for index in self.journal.done.keys() - proven if self._may_count(index, files)}
        if lost:
            text = f"{len(lost)} tasks were done again: their bytes are not what the interrupted run wrote"
            self.report(Note("resume", text))
        return tuple(index for index in self._mine() if index not in proven)

    def _mine(self) -> Iterator[int]:
        """The numbers of the tasks that are this process's."""
        return (index for index, task in enumerate(self.plan.tasks) if self.part.has(_shard(task)))

    def end(self) -> None:
        """After the executor: journal the rest, name the last files; raises `OutputError` where a task is missing."""
        self.flush()
        left = [index for index in self._mine() if index not in self._added]
        if left:
            name = self.plan.tasks[left[0]].source.name
            raise OutputError(f"the executor left {len(left)} tasks undone, such as that of `{name}`")

    def _prove(self, files: Files | None) -> set[int]:
        """The journalled tasks whose bytes are still there, read by as many threads as the plan has workers."""
        here = (index for index in sorted(self.journal.done) if self._may_count(index, files))
        numbers, proven = deque(here), set[int]()
        stop, errors = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                while numbers:
                    with suppress(IndexError):  # another took the last one
                        index = numbers.popleft()
                        task = self.plan.tasks[index]
                        if self._is_proven(task, self.journal.done[index], files, stop):
                            proven.add(index)
                            self.report(Progress(task.source.name, task.source.nbytes))
            except _Stopped:
                pass
            except BaseException as error:  # raised by the thread that waits
                errors.append(error)
                stop.set()

        with ThreadPoolExecutor(max(1, self.plan.execution.workers)) as pool:
            try:
                wait([pool.submit(work) for _ in range(min(len(numbers), self.plan.execution.workers))])
            except BaseException:
                stop.set()
                raise
        if errors:
            raise errors[0]
        return proven

    def _may_count(self, index: int, files: Files | None) -> bool:
        """Whether a journalled task is here, can be proven, and has been seen by a witness where there is one."""
        task, seen = self.plan.tasks[index], self.witness is None or self.journal.done[index].seen
        return _shard(task) not in self.shipped and (task.has_sums or files is not None) and seen

    def _is_proven(self, task: Task, known: TaskResult, files: Files | None, stop: threading.Event) -> bool:
        if task.has_sums:
            return all(self._sum(task, o, stop) == sum_ for o, sum_ in zip(task.outputs, known.sums, strict=True))
        assert files
        (output,), ref = task.outputs, task.source.values
        mine, theirs = bytearray(min(READ_NBYTES, ref.nbytes)), bytearray(min(READ_NBYTES, ref.nbytes))
        for begin, end in spans(0, output.nbytes, READ_NBYTES):
            if end - begin < len(mine):
                mine, theirs = bytearray(end - begin), bytearray(end - begin)
            self._read_back(output, begin, memoryview(mine), stop)
            files.read_into(ref.file, memoryview(theirs), ref.offset + begin)
            if mine != theirs:
                return False
        return True

    def _sum(self, task: Task, output: Output, stop: threading.Event) -> str:
        """The sum of what the file holds of a tensor."""
        total, buffer = 0, bytearray()
        for begin, end in pieces_of(task, output):
            if len(buffer) != end - begin:
                buffer = bytearray(end - begin)
            self._read_back(output, begin, memoryview(buffer), stop)
            total += self.sums.of(memoryview(buffer), begin)
        return self.sums.text(total)

    def _read_back(self, output: Output, begin: int, buffer: memoryview, stop: threading.Event) -> None:
        if stop.is_set():
            raise _Stopped
        read_back(self._fds[output.shard], output, begin, buffer)

    def add(self, index: int, result: TaskResult) -> None:
        """Take a finished task; the next `flush` makes it count."""
        task = self.plan.tasks[index]
        self.hashes.add((task,))
        with self._lock:
            if index in self._added:  # an executor that tries again may have been answered twice
                return
            self._added.add(index)
            self._left[_shard(task)] -= 1
            self._waiting.append((index, result))
            self.waiting_nbytes += task.output_nbytes

    @property
    def due(self) -> bool:
        """Whether enough finished work waits for a `flush`."""
        return self.waiting_nbytes >= FLUSH_NBYTES or time.monotonic() - self._flushed_at >= FLUSH_SECONDS

    def flush(self) -> tuple[int, ...]:
        """Make finished tasks durable and journal them; name the files that are complete, and return their shards.

        After one failure nothing is journalled any more: the system reports lost writes only once.
        """
        with self._lock:
            batch = list(self._waiting)
            complete = [s for s in range(len(self.plan.shards)) if self._left[s] == 0 and s not in self._complete]
        self._flushed_at = time.monotonic()
        if self._failed or not (batch or complete):
            return ()
        tasks = [self.plan.tasks[index] for index, _ in batch]
        try:
            for shard in sorted({*complete, *map(_shard, tasks)}):
                self._sync(shard)
            if batch:
                self.journal.append(batch)
        except OutputError:
            self._failed = True
            raise
        with self._lock:
            del self._waiting[: len(batch)]
            self.waiting_nbytes -= sum(task.output_nbytes for task in tasks)
        for shard in complete:
            self._give_name(shard)
        return tuple(complete)

    def _fd(self, shard: int) -> int:
        if shard not in self._fds:
            self._fds[shard] = open_partial(self.folder, self.plan.shards[shard])
        return self._fds[shard]

    def _sync(self, shard: int) -> None:
        fd = self._fd(shard)
        try:
            machine.sync_data(fd)
            if shard not in self._named:
                fsync_folder(self.folder)
                self._named.add(shard)
        except OSError as error:
            raise OutputError(f"cannot sync `{self.plan.shards[shard].file}`: {error.strerror}") from error

    def _give_name(self, shard: int) -> None:
        done = self.plan.shards[shard]
        os.close(self._fds.pop(shard))
        try:
            (self.folder / f"{done.file}.partial").replace(self.folder / done.file)
        except OSError as error:
            raise OutputError(f"cannot rename `{done.file}`: {error.strerror}") from error
        self._complete.add(shard)
        self.report(ShardWritten(done.file, done.nbytes))
        self.completed(shard)

    def close(self) -> None:
        """Close what is still open; complete files stay, partial ones stay partial."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class _Stopped(Exception):
    """Another thread failed, or the user interrupted."""


def one_at_a_time(report: Reporter) -> Reporter:
    """The same reporter for several threads."""
    lock = threading.Lock()

    def call(event: Event) -> None:
        with lock:
            report(event)

    return call


def _admitted(shard: int, pulse: Callable[[], None]) -> None:
    """Every shard may be opened, where all of them stay."""


def _left_alone(shard: int) -> None:
    """A complete shard, where it stays."""


def _shard(task: Task) -> int:
    """All outputs of a task are in one file."""
    return task.outputs[0].shard
