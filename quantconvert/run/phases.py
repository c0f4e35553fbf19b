"""What a run begins with and goes on to, as events; the first is told before torch is imported. Imports no torch."""

from __future__ import annotations

from quantconvert.events import Event, Reporter, Started
from quantconvert.patterns import layer_of
from quantconvert.planning import Plan


def bag_started(plan: Plan) -> Started | None:
    """A bag of tokens is pushed through the layers, where the plan needs one."""
    walk = plan.knowledge.walk if plan.knowledge else None
    if walk is None:
        return None
    count = sum(1 for layer in walk.layers for _ in layer.linears)
    return Started(count, walk.read_nbytes, "observing a bag of tokens in")


def factors_started(plan: Plan) -> Started | None:
    """Factors are found, where the plan needs some."""
    if plan.factors is None:
        return None
    count = sum(len(wanted.drivers) for wanted in plan.factors.wanted)
    return Started(count, plan.factors.read_nbytes, "equalizing")


def tasks_started(plan: Plan) -> Started:
    """Tasks are carried out."""
    num_layers = len({layer_of(task.source.name) for task in plan.tasks} - {None})
    return Started(len(plan.tasks), plan.checkpoint.nbytes, num_layers=num_layers)


def opening(plan: Plan, is_begun: bool) -> Started:
    """The first of them. is_begun: whether tasks of an interrupted run are done, and so what comes before them."""
    first = None if is_begun else bag_started(plan) or factors_started(plan)
    return first or tasks_started(plan)


def without_repeats(report: Reporter) -> Reporter:
    """The same reporter, told of each beginning once, though it was told ahead."""
    last: list[Started] = []

    def call(event: Event) -> None:
        if isinstance(event, Started):
            if last == [event]:
                return
            last[:] = [event]
        report(event)

    return call
