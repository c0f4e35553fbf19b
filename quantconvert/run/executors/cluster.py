"""The Ray executor: batches of tasks on the machines of a cluster, which share the folder of the result.

Results come back to the driver's ledger, so that the journal is the ordinary one: what a cluster began the threads of
one machine finish, and the reverse. No plan travels: each process builds its own from headers (`order.py`). A
batch that is carried out twice writes the same bytes to the same places. Ray is an extra (`quantconvert[ray]`),
imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantconvert.errors import OutputError, QuantConvertError, UnsupportedError
from quantconvert.events import Progress, Reporter
from quantconvert.run.executors.base import Build
from quantconvert.run.executors.order import Order
from quantconvert.run.ledger import Ledger
from quantconvert.run.result import TaskResult
from quantconvert.run.spool import Spool, in_order

# Source bytes of a batch: some seconds of one core, and what is done again where a machine is lost.
BATCH_NBYTES = 1_000_000_000
# And of tasks, whose numbers travel.
BATCH_TASKS = 1000
# What Python with torch takes beside a task's own memory.
PROCESS_NBYTES = 400_000_000
RETRIES = 4  # of a batch whose process or machine is gone; an error of ours is raised at once
POLL_SECONDS = 0.2

Found = list[tuple[int, TaskResult]]


class Cluster:
    """One run on the cluster that Ray finds (`RAY_ADDRESS`), or on this machine where it finds none."""

    def __init__(self, build: Build, ledger: Ledger, report: Reporter) -> None:
        if isinstance(build.source, Spool):
            raise UnsupportedError(
                "--executor ray reads a source that all machines reach", hint="--no-stream, or --shards K/N on each"
            )
        self.build, self.ledger, self.report, self.ray = build, ledger, report, _ray()

    def run(self, tasks: Sequence[int]) -> None:
        """Carry out `tasks`. The first error ends the run and is raised."""
        ray, is_ours = self.ray, not self.ray.is_initialized()
        if is_ours:
            ray.init(log_to_driver=False, configure_logging=False)
        try:
            self._carry_out(list(self._batches(tasks)))
        finally:
            if is_ours:
                ray.shutdown()

    def _batches(self, tasks: Sequence[int]) -> Iterator[list[int]]:
        """Neighbours in the result, so that few machines write into one file."""
        batch, nbytes = list[int](), 0
        for index in in_order(self.build.plan, tasks):
            batch.append(index)
            nbytes += self.build.plan.tasks[index].source.nbytes
            if nbytes >= BATCH_NBYTES or len(batch) == BATCH_TASKS:
                yield batch
                batch, nbytes = [], 0
        if batch:
            yield batch

    def _carry_out(self, batches: Sequence[list[int]]) -> None:
        ray, order = self.ray, Order.give(self.build)
        peak = max(self.build.plan.tasks[index].peak_nbytes for batch in batches for index in batch)
        remote = ray.remote(num_cpus=1, memory=peak + PROCESS_NBYTES, max_retries=RETRIES)(carry_out_batch)
        pending = [remote.remote(order, batch) for batch in batches]
        try:
            while pending:
                done, pending = ray.wait(pending, timeout=POLL_SECONDS)
                for reference in done:
                    self._take(reference)
                if self.ledger.due:
                    self.ledger.flush()
        finally:
            order.withdraw()
            for reference in pending:
                ray.cancel(reference, force=True)

    def _take(self, reference: Any) -> None:
        try:
            found: Found | QuantConvertError = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise OutputError(f"the cluster lost a part of the work {RETRIES + 1} times: {reason}") from error
        if isinstance(found, QuantConvertError):  # no word on the data: what is done stays
            raise found from RuntimeError("a machine of the cluster cannot take part")
        for index, result in found:
            self.ledger.add(index, result)
            source = self.build.plan.tasks[index].source
            self.report(Progress(source.name, source.nbytes))


def carry_out_batch(order: Order, tasks: Sequence[int]) -> Found | QuantConvertError:
    """In a process of the cluster; what is against its taking part is returned."""
    from quantconvert.lazy import load_torch
    from quantconvert.run.executors.carry import carry_out_tasks
    from quantconvert.run.work import needs_torch

    try:
        build = order.build()
    except QuantConvertError as error:
        return error
    if needs_torch(build.plan.tasks[index] for index in tasks):
        load_torch()
        import torch

        torch.set_num_threads(1)
    return carry_out_tasks(build, tasks)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UnsupportedError("--executor ray needs Ray", hint="install the extra: quantconvert[ray]") from error
    return ray
