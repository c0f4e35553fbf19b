"""`plan`: the dry run on stdout, as totals, as kinds of tensor, or tensor by tensor with the rule behind each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from quantconvert.cli.lines import stdout
from quantconvert.cli.output import accounts, kept_rows, method_rows, plan_rows, print_facts, size_rows
from quantconvert.families import REASON_TEXT
from quantconvert.patterns import template_of
from quantconvert.planning import Plan, Task
from quantconvert.planning.tasks import role_of
from quantconvert.text import size

NAME_WIDTH = 48  # on a narrow terminal sentences are broken rather than names
Detail = Literal["totals", "kinds", "tensors"]


def print_plan(plan: Plan, free: int | None, detail: Detail) -> None:
    """Totals and kinds of decision; before them what `detail` asks for. free: bytes where the result would go."""
    if detail != "totals":
        _print_kinds(plan) if detail == "kinds" else _print_tensors(plan)
    rows = plan_rows(plan) + size_rows(plan)
    rows.append(("tensors", accounts(plan)))
    rows += kept_rows(plan) + method_rows(plan)
    rows.append(("memory", f"{size(plan.peak_nbytes)} at its peak with {plan.execution.workers} workers, "
                           "on top of Python with torch"))  # fmt: skip
    rows.append(("disk", f"{size(plan.output_nbytes)} needed" + (f", {size(free)} free" if free is not None else "")))
    rows += [("note", note) for note in plan.notes]
    print_facts(stdout, rows)


def _print_kinds(plan: Plan) -> None:
    """A row for all tensors that differ in numbers of their names alone and fare alike."""
    from quantconvert.cli.tables import print_table

    rows: dict[tuple[str, ...], int] = {}
    for task in plan.tasks:
        row = (template_of(task.source.name), _dtypes(task), _what(task))
        rows[row] = rows.get(row, 0) + 1
    for dropped in plan.dropped:
        row = (template_of(dropped.ref.name), dropped.ref.dtype, f"dropped: {dropped.reason}")
        rows[row] = rows.get(row, 0) + 1
    print_table(
        ("tensor (N = any number)", "count", "dtype", "what becomes of it"),
        ((name, str(count), dtype, what) for (name, dtype, what), count in rows.items()),
        min(NAME_WIDTH, max((len(name) for name, _, _ in rows), default=0)),
    )


def _what(task: Task) -> str:
    """`int4 g128 symmetric`, or why it stays: `embedding: embeddings are looked up, not multiplied`."""
    if task.reason is not None:
        return f"{task.reason}{_changed(task)}: {REASON_TEXT[task.reason]}"
    return task.scheme.label if task.scheme else "plain"


def _changed(task: Task) -> str:
    """Of what stays in high precision, but takes what weights give away."""
    return ", changed" if task.source.steps else ""


def _print_tensors(plan: Plan) -> None:
    from quantconvert.cli.tables import print_table

    print_table(("tensor", "shape", "dtype", "role", "decision", "rule"), _rows(plan))


def _rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    for task in plan.tasks:
        decision = task.scheme.label if task.scheme else f"keep{_changed(task)}: {task.reason}"
        shape = "x".join(map(str, task.source.shape))
        yield task.source.name, shape, _dtypes(task), role_of(task), decision, task.evidence
    for dropped in plan.dropped:
        ref = dropped.ref
        shape = "x".join(map(str, ref.shape))
        yield ref.name, shape, ref.dtype, "duplicate or scale", "drop", dropped.reason


def _dtypes(task: Task) -> str:
    """What is stored, and what it is read as where that differs: `F8_E4M3 as BF16`."""
    stored = task.inputs[0].dtype
    return stored if stored == task.source.dtype else f"{stored} as {task.source.dtype}"
