"""A plan of what a repository holds: all that `plan` takes, and the first thing that a conversion does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quantconvert.checkpoint import Checkpoint, Repo, load_checkpoint
from quantconvert.job import Limits
from quantconvert.planning import Plan

Builder = Callable[[Checkpoint], Plan]


def planned(repo: Repo, build: Builder) -> Plan:
    """The plan by `build`; raises what that and reading the headers raise, and `UsageError` for an executor that does
    not exist.
    """
    with _no_garbage():
        plan = build(load_checkpoint(repo))
    if plan.job.limits.executor != Limits().executor:
        from quantconvert.run.executors import EXECUTORS

        EXECUTORS.find(plan.job.limits.executor)
    return plan


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Planning makes hundreds of thousands of small values and no cycles; looking for cycles took a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
