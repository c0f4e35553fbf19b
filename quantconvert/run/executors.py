"""The thread executor: tasks in the source's order, as many at once as workers and memory allow.

Torch runs single-threaded inside each worker (its operations release the interpreter's lock), so that the number of
workers is the number of busy cores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.checkpoint import RepoFile
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.events import Event, Note, Progress, Reporter, ShardWritten
from quantconvert.planning import Copy, Plan, Task
from quantconvert.run import shards as shard_writer
from quantconvert.run.io import Files
from quantconvert.run.journal import Checksums, Journal
from quantconvert.run.shards import ShardWriter
from quantconvert.run.work import Bench

POLL_SECONDS = 0.2


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
    """Runs a plan's tasks with `plan.execution.workers` threads and writes shards into `folder`.

    A task that `journal` has is skipped when its bytes in `folder` have the checksums that the journal names.
    """

    def __init__(self, plan: Plan, source: Path, folder: Path, journal: Journal, report: Reporter) -> None:
        self.plan, self.source, self.folder, self.journal = plan, source, folder, journal
        self._report_unlocked = report
        self._lock = threading.Lock()
        self._pending: Iterator[tuple[int, Task]] = iter(enumerate(plan.tasks))
        self._budget = _Budget(plan.execution.memory_limit)
        self._errors: list[BaseException] = []
        self._num_redone = 0
        self._stop = threading.Event()

    def run(self) -> None:
        """Carry out every task that is not done.

        The first error stops all workers and is raised. On errors and interruptions what was finished is journalled.
        """
        before = _status(self.source, self.plan.checkpoint.weight_files)
        writer = ShardWriter(
            self.plan, self.folder, self.journal, lambda s: self._report(ShardWritten(s.file, s.nbytes))
        )
        try:
            self._run_workers(writer)
            writer.flush()
        except BaseException:
            with suppress(OutputError):
                writer.flush()
            raise
        finally:
            writer.close()
        if self._num_redone:
            text = f"{self._num_redone} tasks were done again: their bytes are not what the interrupted run wrote"
            self._report(Note("resume", text))
        _status(self.source, before)

    def _run_workers(self, writer: ShardWriter) -> None:
        files = Files(self.source)
        count = min(self.plan.execution.workers, max(1, len(self.plan.tasks)))
        threads_before = torch.get_num_threads()
        ends = [threading.Event() for _ in range(count)]
        threads = [threading.Thread(target=self._work, args=(files, writer, end), daemon=True) for end in ends]
        try:
            for thread in threads:
                thread.start()
            _wait(ends, writer)
        finally:
            self._stop.set()
            _wait([end for thread, end in zip(threads, ends, strict=True) if thread.ident is not None])
            for thread in threads:
                thread.join()
            files.close()
            torch.set_num_threads(threads_before)
        if self._errors:
            raise self._errors[0]

    def _report(self, event: Event) -> None:
        with self._lock:
            self._report_unlocked(event)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _advance(self, name: str, nbytes: int) -> None:
        self._check_stop()
        self._report(Progress(name, nbytes))

    def _next(self) -> tuple[int, Task] | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._pending, None)

    def _work(self, files: Files, writer: ShardWriter, end: threading.Event) -> None:
        torch.set_num_threads(1)
        plan = self.plan
        bench = Bench(files, writer, Workspace(), plan.execution, self._advance, self.journal.noise)
        try:
            while (step := self._next()) is not None:
                index, task = step
                self._budget.acquire(task.peak_nbytes)
                try:
                    self._carry_out(bench, index, task)
                finally:
                    self._budget.release(task.peak_nbytes)
                while writer.waiting_nbytes > shard_writer.MAX_WAITING_NBYTES and not self._stop.wait(0.01):
                    pass
        except _Stopped:
            pass
        except BaseException as error:  # handed to the thread that called run()
            with self._lock:
                self._errors.append(error)
            self._stop.set()
        finally:
            end.set()

    def _carry_out(self, bench: Bench, index: int, task: Task) -> None:
        """Do one task, unless it is done and its bytes prove it."""
        known, writer = self.journal.done.get(index), bench.writer
        if known is not None:
            if self._is_proven(bench, task, known):
                self._advance(task.source.name, task.source.nbytes)
                writer.task_done(index, known)
                return
            with self._lock:
                self._num_redone += 1
        bench.carry_out(task)
        writer.task_done(index, writer.sums(task, bench.work, self._check_stop))

    def _is_proven(self, bench: Bench, task: Task, known: Checksums) -> bool:
        """Whether the bytes in the file are those of the finished task."""
        if not isinstance(task, Copy):
            return bench.writer.sums(task, bench.work, self._check_stop) == known
        (output,), ref, same = task.outputs, task.source.values, True
        for begin, part in bench.writer.read_back(output, bench.work):
            self._check_stop()
            original = bench.work.tensor("raw", torch.uint8, tuple(part.shape))
            bench.files.read_into(ref.file, bytes_of(original), ref.offset + begin)
            same = same and torch.equal(original, part)
        return same


def _status(root: Path, files: tuple[RepoFile, ...]) -> tuple[RepoFile, ...]:
    """The files with their modification times; raises `CheckpointError` when one is not what `files` says."""
    found = []
    for file in files:
        try:
            status = (root / file.path).stat()
        except OSError as error:
            raise CheckpointError(f"cannot open `{file.path}` of the source: {error.strerror}") from error
        now = RepoFile(file.path, status.st_size, status.st_mtime_ns)
        if now.nbytes != file.nbytes or file.mtime_ns not in (None, now.mtime_ns):
            raise CheckpointError(
                f"`{file.path}` of the source changed after it was planned: expected {file.nbytes} bytes"
                f" (mtime {file.mtime_ns} ns), got {now.nbytes} ({now.mtime_ns} ns)"
            )
        found.append(now)
    return tuple(found)


def _wait(ends: list[threading.Event], writer: ShardWriter | None = None) -> None:
    """Wait for workers, in short steps so that the main thread hears signals; journal meanwhile what they finish.

    Not by `Thread.join`: when an exception interrupts it, Python before 3.13 takes a running thread for finished
    (bpo-45274), and a worker that is inside torch when the process ends aborts it.
    """
    for end in ends:
        while not end.wait(POLL_SECONDS):
            if writer is not None and writer.due:
                writer.flush()


class _Stopped(Exception):
    """Another worker failed, or the user interrupted: drop the current tile."""
