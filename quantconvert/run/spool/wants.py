"""Which bytes of the source something reads: ranges of files, by the headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from quantconvert.dtypes import DTYPES
from quantconvert.factors.sampling import sample
from quantconvert.factors.wanted import Wanted, sampled_rows
from quantconvert.planning import Plan, Quantize, Task
from quantconvert.sources import ENCODINGS, Read

# To fetch so many bytes takes no longer than to ask once more.
GAP_NBYTES = 256_000


class Want(NamedTuple):
    """Bytes begin..end of a file, half-open."""

    file: str
    begin: int
    end: int


# What each of several readings, in their order, needs to be there.
Items = Sequence[Sequence[Want]]


def in_order(plan: Plan, tasks: Iterable[int]) -> list[int]:
    """Numbers of tasks in the order in which they are carried out: that of their places in the result."""

    def place(index: int) -> tuple[int, int]:
        output = plan.tasks[index].outputs[0]
        return output.shard, output.offset

    return sorted(tasks, key=place)


def items_of_tasks(tasks: Iterable[Task]) -> Items:
    """Of tasks: their sources, what steps look at, and weights of which they need the largest value."""
    return [tuple(_wants_of_task(task)) for task in tasks]


def items_of_reads(reads: Iterable[Read | None]) -> Items:
    """Of tensors, whole; none where there is nothing to read."""
    return [tuple(wants_of(read)) if read else () for read in reads]


def items_of_factors(plan: Plan) -> Items:
    """Of the first pass: the sampled rows of each weight, and the vectors that take the factors."""
    return [tuple(_wants_of_factors(wanted)) for wanted in (plan.factors.wanted if plan.factors else ())]


def wants_of(read: Read) -> Iterator[Want]:
    """Every stored tensor that a read looks at; of a stack of experts whose values are read by rows the one's."""
    ref = read.values
    whole = ref.offset, ref.offset + ref.nbytes
    yield Want(read.file, *(_matrix(read) if ENCODINGS[read.encoding].by_rows else whole))
    yield from _beside(read)


def _matrix(read: Read) -> tuple[int, int]:
    """Where the values lie of which a view is: all of a tensor, or one expert of several."""
    ref, expert = read.values, read.view.expert
    nbytes = ref.nbytes if expert is None else ref.nbytes // ref.shape[0]
    begin = ref.offset + (expert or 0) * nbytes
    return begin, begin + nbytes


def _beside(read: Read) -> Iterator[Want]:
    """All but the values: scales and the like, and what steps look at."""
    for ref in (*read.inputs[1:], *read.partners):
        yield Want(ref.file, ref.offset, ref.offset + ref.nbytes)


def _wants_of_task(task: Task) -> Iterator[Want]:
    yield from wants_of(task.source)
    for sibling in task.siblings if isinstance(task, Quantize) else ():
        yield from wants_of(sibling)


def _wants_of_factors(wanted: Wanted) -> Iterator[Want]:
    for giver in wanted.site.givers:
        yield from wants_of(giver) if len(giver.shape) == 1 else ()
    for driver, count in sampled_rows(wanted):
        read, view = driver.read, driver.read.view
        if not ENCODINGS[read.encoding].by_rows or view.transposed or len(read.shape) != 2:
            yield from wants_of(read)
            continue
        yield from _beside(read)
        ref = read.values
        row = ref.shape[-1] * DTYPES[ref.dtype].bits // 8
        first = _matrix(read)[0] + view.start * row
        runs = [(begin * view.step * row, ((end - 1) * view.step + 1) * row) for begin, end in sample(read, count)]
        for begin, end in _joined(runs):
            yield Want(ref.file, first + begin, first + end)


def _joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same ranges; those between which little lies are one."""
    whole: tuple[int, int] | None = None
    for begin, end in runs:
        if whole is not None and begin - whole[1] > GAP_NBYTES:
            yield whole
            whole = None
        whole = (whole[0] if whole else begin, end)
    if whole is not None:
        yield whole
