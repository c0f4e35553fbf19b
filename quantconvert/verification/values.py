"""Every tensor of a result: its codes alone, or its values against the source. Torch is loaded where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing

from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.events import Reporter, Started, silent
from quantconvert.factors import FACTORS
from quantconvert.job import Limits
from quantconvert.kernels.native.choice import chosen
from quantconvert.lazy import load_torch
from quantconvert.planning.memory import execution_for
from quantconvert.planning.plan import Execution
from quantconvert.run.spool import holding, items_of_reads
from quantconvert.sources import Read, Sources
from quantconvert.verification.pairs import Pace, Pair, Values, pairs_of, refused
from quantconvert.verification.place import Place
from quantconvert.verification.quick import Quick

# So many threads, as a context.
Pool = Callable[[int], AbstractContextManager[ThreadPoolExecutor]]


def check_values(
    place: Place,
    tensors: Sequence[Read],
    source: tuple[Repo, Sources] | None,
    limits: Limits,
    method: str | None = None,
    report: Reporter = silent,
) -> Values:
    """Findings and errors over all tensors of the result in `place`, in their order, whatever the number of workers.

    source: the source's repository and what is read of it. method: which one quantized the weights; None: that of
    another tool. Raises `UsageError` for a kernel that is not to be had here.
    """
    execution, kernel = execution_for(limits), chosen()
    found, pace = Values(), Pace(report)
    pairs = list(pairs_of(tensors, source[1] if source else None, pace, found))
    report(Started(len(pairs), sum(pair.tensor.nbytes for pair in pairs), "checking"))
    with ExitStack() as stack:
        files, theirs = stack.enter_context(closing(Files(place.repo))), None
        if source:
            theirs = stack.enter_context(closing(Files(source[0], {FACTORS: place.folder / FACTORS})))
        quick = Quick(files, theirs, execution, method, kernel)
        repos = place.repo, source[0] if source else None
        workers = _workers(pairs, quick.peak, execution)
        parts = _checked(pairs, repos, quick.check, ThreadPoolExecutor, workers, pace)
        left = [i for i, part in enumerate(parts) if part is None]
        if left:
            load_torch()
            from quantconvert.verification.reference import Reference
            from quantconvert.workers import worker_pool

            reference, rest = Reference(files, theirs, execution, method), [pairs[i] for i in left]
            workers = _workers(rest, reference.peak, execution)
            judged = _checked(rest, repos, reference.check, worker_pool, workers, pace)
            for i, part in zip(left, judged, strict=True):
                parts[i] = part
    for part in filter(None, parts):
        found.add_all(part)
    return found


def _workers(pairs: Sequence[Pair], peak: Callable[[Pair], int], execution: Execution) -> int:
    """As many threads as there is room for where each has the largest pair."""
    most = max(map(peak, pairs), default=1)
    return max(1, min(execution.workers, execution.memory_limit // max(1, most), len(pairs)))


def _checked(
    pairs: Sequence[Pair],
    repos: tuple[Repo, Repo | None],
    check: Callable[[Pair], Values | None],
    pool: Pool,
    workers: int,
    pace: Pace,
) -> list[Values | None]:
    """What each pair shows, in order; None where `check` leaves it open. repos: of the result and of the source."""
    with ExitStack() as stack:
        ours, theirs = repos
        mine = items_of_reads(pair.tensor for pair in pairs)
        holds = [stack.enter_context(holding(ours, lambda: mine, pace.pulse))]
        if theirs is not None:
            origins = items_of_reads(pair.origin for pair in pairs)
            holds.append(stack.enter_context(holding(theirs, lambda: origins, pace.pulse)))

        def checked(item: int) -> Values | None:
            for hold in holds:
                hold.need(item)
            found = refused(pairs[item], check)
            for hold in holds:
                hold.done(item)
            return found

        threads = stack.enter_context(pool(workers))
        try:
            return list(threads.map(checked, range(len(pairs))))
        except BaseException:
            pace.stop()
            raise
