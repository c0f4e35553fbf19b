"""A plan of what a repository holds: all that `plan` takes, and the first thing that a conversion does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from quantconvert.checkpoint import Checkpoint, Repo, load_checkpoint, reader_of
from quantconvert.events import Reporter, silent
from quantconvert.job import Job, Limits
from quantconvert.lazy import load_torch
from quantconvert.planning import Plan, build_plan, build_transcode

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


def builder_of(repo: Repo, job: Job, report: Reporter = silent, whole: bool = True) -> Builder:
    """What plans `job`; with `target_bits` and `nan_policy` keep it reads the weights of `repo` before: whole, or by
    ranges where they lie.
    """

    def build(checkpoint: Checkpoint) -> Plan:
        if whole and (job.nan_policy == "keep" or job.target_bits is not None):
            repo.prepare(tuple(file.path for file in checkpoint.weight_files))
        nonfinite = _find_nonfinite(checkpoint, repo, job)

        def plan_of(job: Job) -> Plan:
            plan = build_plan(checkpoint, job, reader_of(repo), nonfinite)
            return replace(plan, nonfinite=nonfinite) if nonfinite else plan

        return plan_of(job) if job.target_bits is None else _spend(job, job.target_bits, plan_of, repo, report)

    return build


def planned_again(repo: Repo, job: Job, nonfinite: Mapping[str, str]) -> Plan:
    """A plan that another process has made, from headers alone: `job` is the plan's own, and `nonfinite` what was found
    in the weights before.
    """

    def build(checkpoint: Checkpoint) -> Plan:
        if job.operation == "convert":
            return build_plan(checkpoint, job, reader_of(repo), nonfinite)
        return build_transcode(checkpoint, job, reader_of(repo), job.dtype)

    return planned(repo, build)


def _spend(job: Job, target: float, plan_of: Callable[[Job], Plan], repo: Repo, report: Reporter) -> Plan:
    """With --target-bits, measure every weight before planning: the plan is that of the rules that follow."""
    from quantconvert.planning.budget import find_offer, spend

    job = replace(job, target_bits=None)
    first = plan_of(job)
    offer = find_offer(job, first, plan_of)
    offer.check(target)
    load_torch()
    from quantconvert.run.measure import measure

    budget = spend(offer, measure(offer, repo, first.execution, report), target)
    plan = plan_of(replace(job, rules=(*job.rules, *budget.rules)))
    return replace(plan, budget=budget, notes=(*plan.notes, *offer.notes))


def _find_nonfinite(checkpoint: Checkpoint, repo: Repo, job: Job) -> Mapping[str, str] | None:
    """With --nan-policy keep, read every weight once before planning; otherwise nothing is read."""
    if job.nan_policy != "keep":
        return None
    load_torch()
    from quantconvert.run.scan import find_nonfinite

    first = build_plan(checkpoint, job, reader_of(repo))
    return find_nonfinite([task.source for task in first.quantized], repo, first.execution)
