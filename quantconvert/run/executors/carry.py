"""Carrying out tasks away from the ledger: in another process, or on another machine that shares the file system."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quantconvert.run.executors.base import Build
from quantconvert.run.result import TaskResult
from quantconvert.run.shards import ShardWriter
from quantconvert.run.work import Bench


def carry_out_tasks(
    build: Build, tasks: Iterable[int], advance: Callable[[str, int], None] = lambda name, nbytes: None
) -> list[tuple[int, TaskResult]]:
    """Carry out tasks of `build.plan` by number; their bytes are on disk when the results are returned.

    advance: told of source bytes that are done, by tensor. Raises what a conversion raises; nothing is lost by doing
    the same tasks again. Uses as many threads as torch is set to: call `torch.set_num_threads(1)` where several
    processes share a machine.
    """
    files, writer = build.open_files(), ShardWriter(build.plan, build.folder)
    plan = build.plan
    bench = Bench(files, writer, plan.execution, advance)
    try:
        found = [(index, bench.carry_out(index, plan.tasks[index])) for index in tasks]
        writer.sync()
        return found
    finally:
        writer.close()
        files.close()
