"""The thread executor: tasks in the source's order, as many at once as workers and memory allow.

Torch runs single-threaded inside each worker (its operations release the interpreter's lock), so that the number of
workers is the number of busy cores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from quantconvert.events import Event, Progress, Reporter, ShardWritten
from quantconvert.planning import Plan, Task
from quantconvert.run.io import Files, Workspace
from quantconvert.run.tasks import Bench
from quantconvert.run.writer import ShardWriter


class _Budget:
    """Admits tasks while the sum of their peaks stays within the limit; one task is always admitted."""

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


class ThreadExecutor:
    """Runs a plan's tasks with `plan.execution.workers` threads and writes shards into `folder`."""

    def __init__(self, plan: Plan, source: Path, folder: Path, report: Reporter) -> None:
        self.plan, self.source, self.folder = plan, source, folder
        self._report_unlocked = report
        self._lock = threading.Lock()
        self._pending: Iterator[Task] = iter(plan.tasks)
        self._budget = _Budget(plan.execution.memory_limit)
        self._errors: list[BaseException] = []
        self._stop = threading.Event()
        self.noise: dict[str, tuple[float, float]] = {}

    def run(self) -> None:
        """Carry out every task; the first error stops all workers and is raised."""
        files = Files(self.source)
        writer = ShardWriter(self.plan, self.folder, lambda s: self._report(ShardWritten(s.file, s.nbytes)))
        count = min(self.plan.execution.workers, max(1, len(self.plan.tasks)))
        threads_before = torch.get_num_threads()
        ends = [threading.Event() for _ in range(count)]
        threads = [threading.Thread(target=self._work, args=(files, writer, end), daemon=True) for end in ends]
        try:
            for thread in threads:
                thread.start()
            _wait(ends)
        finally:
            self._stop.set()
            _wait([end for thread, end in zip(threads, ends, strict=True) if thread.ident is not None])
            for thread in threads:
                thread.join()
            writer.close()
            files.close()
            torch.set_num_threads(threads_before)
        if self._errors:
            raise self._errors[0]

    def _report(self, event: Event) -> None:
        with self._lock:
            self._report_unlocked(event)

    def _advance(self, name: str, nbytes: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._report(Progress(name, nbytes))

    def _next(self) -> Task | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._pending, None)

    def _work(self, files: Files, writer: ShardWriter, end: threading.Event) -> None:
        torch.set_num_threads(1)
        plan = self.plan
        bench = Bench(files, writer, Workspace(), plan.execution, plan.format, self._advance, self.noise)
        try:
            while (task := self._next()) is not None:
                self._budget.acquire(task.peak_nbytes)
                try:
                    bench.carry_out(task)
                finally:
                    self._budget.release(task.peak_nbytes)
        except _Stopped:
            pass
        except BaseException as error:  # handed to the thread that called run()
            with self._lock:
                self._errors.append(error)
            self._stop.set()
        finally:
            end.set()


def _wait(ends: list[threading.Event]) -> None:
    """Wait for workers, in short steps so that the main thread hears signals.

    Not by `Thread.join`: when an exception interrupts it, Python before 3.13 takes a running thread for finished
    (bpo-45274), and a worker that is inside torch when the process ends aborts it.
    """
    for end in ends:
        while not end.wait(0.2):
            pass


class _Stopped(Exception):
    """Another worker failed, or the user interrupted: drop the current tile."""
