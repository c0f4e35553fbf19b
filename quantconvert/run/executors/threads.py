"""The thread executor: parts of tasks in the order of their places in the result, as many at once as workers and memory
allow.

A call of the C library releases the interpreter's lock once for about 16 MB. Torch, where a task needs it, runs
single-threaded inside each worker, so that the number of workers is the number of busy cores.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from quantconvert.events import Progress, Reporter
from quantconvert.planning import Copy
from quantconvert.run import ledger as books
from quantconvert.run.executors.base import Build
from quantconvert.run.ledger import Ledger
from quantconvert.run.shards import ShardWriter
from quantconvert.run.spool import Hold, Items, holding, in_order, items_of_tasks
from quantconvert.run.work import Bench, Buffers, Errand

POLL_SECONDS = 0.2


# What tasks that a kernel carries out may promise to take together (they take less than half of it): about four of
# large weights whose codes are gathered to be turned, and more would only wait for each other's writes into one file.
KERNEL_NBYTES = 100_000_000


class _Budget:
    """Admits parts while the sum of their peaks stays within the limit; one is always admitted."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def acquire(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + nbytes <= self._limit)
            self._used += nbytes

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


class _Step(NamedTuple):
    """A part of a task, and the place of the task in the order in which they are carried out."""

    item: int
    errand: Errand
    begin: int
    end: int


class ThreadRun:
    """The workers of one run, and what they share."""

    def __init__(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
        self.plan, self.ledger, self.report = build.plan, ledger, report
        self.files, self.writer = build.open_files(), ShardWriter(build.plan, build.folder)
        self._lock = threading.Lock()
        self._source, self._tasks = build.source, in_order(self.plan, tasks)
        self._pending = self._errands(self._tasks)
        self._count = self.plan.execution.workers
        limit = self.plan.execution.memory_limit
        self._budget, self._kernel_budget = _Budget(limit), _Budget(min(limit, KERNEL_NBYTES))
        self._errors: list[BaseException] = []
        self._buffers = Buffers()
        self._stop = threading.Event()

    def _errands(self, tasks: Sequence[int]) -> Iterator[_Step]:
        """Each task's parts, in order; a task is looked at when its first part is asked for."""
        for item, index in enumerate(tasks):
            errand = Errand(index, self.plan.tasks[index], self.files)
            for part in errand.parts:
                yield _Step(item, errand, *part)

    def _items(self) -> Items:
        return items_of_tasks(self.plan.tasks[index] for index in self._tasks)

    def run(self) -> None:
        """Start the workers, journal what they finish, and end when they have."""
        torch: Any = sys.modules.get("torch")  # loaded before, where a task needs it
        threads_before = torch.get_num_threads() if torch else 0
        ends = [threading.Event() for _ in range(self._count)]
        try:
            with holding(self._source, self._items, self._pulse) as hold:
                threads = [threading.Thread(target=self._work, args=(end, hold), daemon=True) for end in ends]
                try:
                    for thread in threads:
                        thread.start()
                    self._wait(ends, flush=True)
                finally:
                    self._stop.set()
                    self._wait([end for thread, end in zip(threads, ends, strict=True) if thread.ident is not None])
                    for thread in threads:
                        thread.join()
        finally:
            self.files.close()
            self.writer.close()
            if torch:
                torch.set_num_threads(threads_before)
        if self._errors:
            raise self._errors[0]

    def _wait(self, ends: list[threading.Event], flush: bool = False) -> None:
        """Wait for workers, in short steps so that the main thread hears signals; journal meanwhile what they finish.

        Not by `Thread.join`: when an exception interrupts it, Python before 3.13 takes a running thread for finished
        (bpo-45274), and a worker that is inside torch when the process ends aborts it.
        """
        for end in ends:
            while not end.wait(POLL_SECONDS):
                if flush and self.ledger.due:
                    for shard in self.ledger.flush():
                        self.writer.release(shard)

    def _advance(self, name: str, nbytes: int) -> None:
        self._pulse()
        self.report(Progress(name, nbytes))

    def _pulse(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _next(self) -> _Step | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._pending, None)

    def _work(self, end: threading.Event, hold: Hold) -> None:
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)
        bench = Bench(self.files, self.writer, self.plan.execution, self._advance, self._buffers)
        try:
            while (step := self._next()) is not None:
                self.ledger.admit(step.errand.task.outputs[0].shard, self._pulse)
                hold.need(step.item)  # before memory is asked for, which an earlier task may wait for
                self._do(bench, step, hold)
                while self.ledger.waiting_nbytes > books.MAX_WAITING_NBYTES and not self._stop.wait(0.01):
                    pass
        except _Stopped:
            pass
        except BaseException as error:  # handed to the thread that called run()
            with self._lock:
                self._errors.append(error)
            self._stop.set()
        finally:
            end.set()

    def _do(self, bench: Bench, step: _Step, hold: Hold) -> None:
        errand, part = step.errand, (step.begin, step.end)
        budget = self._kernel_budget if errand.kernel else self._budget
        budget.acquire(errand.task.peak_nbytes)
        try:
            done = bench.do(errand, *part)
            if isinstance(errand.task, Copy):  # the largest tensors
                self.ledger.hashes.add_parts(((errand.task.outputs[0], *part),))
            if errand.add(step.begin, done):
                result, witness = bench.finish(errand), self.ledger.witness
                if witness is not None:
                    result = result._replace(seen=witness.see(errand.index, self.files, self.writer))
                self.ledger.add(errand.index, result)
                hold.done(step.item)
        finally:
            budget.release(errand.task.peak_nbytes)


class _Stopped(Exception):
    """Another worker failed, or the user interrupted: drop the current tile."""
