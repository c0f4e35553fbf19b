"""Every tensor of a result: its codes alone, or its values against the source. Torch is loaded where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path

from quantconvert.checkpoint import LocalFolder, Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.events import Reporter, Started, silent
from quantconvert.factors import FACTORS
from quantconvert.job import Limits
from quantconvert.kernels.native.choice import chosen
from quantconvert.lazy import load_torch
from quantconvert.planning.memory import execution_for
from quantconvert.planning.plan import Execution
from quantconvert.sources import Read, Sources
from quantconvert.verification.pairs import Pace, Pair, Values, pairs_of, refused
from quantconvert.verification.quick import Quick

# So many threads, as a context.
Pool = Callable[[int], AbstractContextManager[ThreadPoolExecutor]]


def check_values(
    out: Path,
    tensors: Sequence[Read],
    source: tuple[Repo, Sources] | None,
    limits: Limits,
    method: str | None = None,
    report: Reporter = silent,
) -> Values:
    """Findings and errors over all tensors of the result in `out`, in their order, whatever the number of workers.

    source: the source's repository and what is read of it. method: which one quantized the weights; None: that of
    another tool. Raises `UsageError` for a kernel that is not to be had here.
    """
    execution, kernel = execution_for(limits), chosen()
    found, pace = Values(), Pace(report)
    pairs = list(pairs_of(tensors, source[1] if source else None, pace, found))
    report(Started(len(pairs), sum(pair.tensor.nbytes for pair in pairs), "checking"))
    with ExitStack() as stack:
        files, theirs = stack.enter_context(closing(Files(LocalFolder(out)))), None
        if source:
            theirs = stack.enter_context(closing(Files(source[0], {FACTORS: out / FACTORS})))
        quick = Quick(files, theirs, execution, method, kernel)
        parts = _checked(pairs, quick.check, ThreadPoolExecutor, _workers(pairs, quick.peak, execution), pace)
        left = [i for i, part in enumerate(parts) if part is None]
        if left:
            load_torch()
            from quantconvert.verification.reference import Reference
            from quantconvert.workers import worker_pool

            reference, rest = Reference(files, theirs, execution, method), [pairs[i] for i in left]
            judged = _checked(rest, reference.check, worker_pool, _workers(rest, reference.peak, execution), pace)
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
    pairs: Sequence[Pair], check: Callable[[Pair], Values | None], pool: Pool, workers: int, pace: Pace
) -> list[Values | None]:
    """What each pair shows, in order; None where `check` leaves it open."""
    with pool(workers) as threads:
        try:
            return list(threads.map(partial(refused, check=check), pairs))
        except BaseException:
            pace.stop()
            raise
