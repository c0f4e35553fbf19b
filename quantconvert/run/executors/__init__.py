"""The registry of executors: ways to carry out the tasks of a plan. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.events import Reporter
from quantconvert.registry import Registry
from quantconvert.run.executors.base import Build, Executor
from quantconvert.run.ledger import Ledger

__all__ = ["EXECUTORS", "Build", "Executor"]


class Threads:
    """As many threads of this process as the plan has workers."""

    name = "threads"

    def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
        """Carry out `tasks`. The first error stops all workers and is raised."""
        from quantconvert.run.executors.threads import ThreadRun

        ThreadRun(build, tasks, ledger, report).run()


class Ray:
    """Processes of a Ray cluster whose machines share the folder of the result."""

    name = "ray"

    def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
        """Carry out `tasks`, as many at once as the cluster has cores. The first error is raised."""
        from quantconvert.run.executors.cluster import Cluster

        Cluster(build, ledger, report).run(tasks)


EXECUTORS: Registry[Executor] = Registry("executor", Threads(), Ray())
