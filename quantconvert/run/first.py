"""The first pass of a conversion: factors from a sample of rows of each weight, kept before any weight is changed.

What it finds does not depend on the number of workers, and is synced under its final name: a run that continues
another uses the factors of that one. Imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.events import Progress, Reporter, Started
from quantconvert.factors import FACTORS, Driver, Factors, Wanted, read_places
from quantconvert.factors.recipe import calm_norm, calm_rows, clamped, equalize, power_of_two, settled
from quantconvert.factors.wanted import sampled_rows
from quantconvert.planning import Execution, Plan
from quantconvert.run.disk import fsync_folder, write_file
from quantconvert.run.ledger import one_at_a_time
from quantconvert.sources import Read, cost_of, open_rows

# Rows that are read at once: neighbours cost one read, and what is stored transposed is read in strips.
RUN_ROWS, TURNED_ROWS = 8, 64
# Elements of float32 that a block holds.
BLOCK_ELEMENTS = 1 << 18
# What a column takes beside its blocks: factors, sums, and the candidates of `settled`.
VECTOR_BYTES = 1500


def find_factors(plan: Plan, repo: Repo, folder: Path, is_begun: bool, report: Reporter) -> None:
    """Write the plan's factors into `folder`, unless an interrupted run has.

    is_begun: whether tasks of that run are done, which used its factors. Raises `OutputError` where these are gone,
    and what reading the source raises.
    """
    factors = plan.factors
    if factors is None or _is_there(factors, folder, is_begun):
        return
    report = one_at_a_time(report)
    report(Started(len(factors.wanted), factors.read_nbytes, "equalizing"))
    work = _Pass(Files(repo), plan.execution, report)
    try:
        found = work.run(factors.wanted)
    finally:
        work.files.close()
    partial = folder / f"{FACTORS}.partial"
    try:
        write_file(partial, factors.file.content(found))
        partial.replace(folder / FACTORS)
        fsync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot write `{FACTORS}`: {error.strerror}") from error


def _is_there(factors: Factors, folder: Path, is_begun: bool) -> bool:
    try:
        found = [*read_places(folder).values()] == [wanted.place for wanted in factors.wanted]
    except CheckpointError:
        found = False
    if is_begun and not found:
        raise OutputError(f"`{FACTORS}` of the interrupted run is gone", hint="--restart starts over")
    return found


class _Pass:
    """Sites, as many at once as there are workers; torch runs single-threaded in each."""

    def __init__(self, files: Files, execution: Execution, report: Reporter) -> None:
        self.files, self.execution, self.report = files, execution, report
        self._own, self._stop = threading.local(), threading.Event()

    def _count(self, wanted: Sequence[Wanted]) -> int:
        """Workers: as many as there is memory for."""
        most = max(cost_of(d.read, _slab_nbytes(d.read)).held for w in wanted for d in w.drivers)
        vectors = max(VECTOR_BYTES * w.drivers[0].read.matrix[1] for w in wanted)
        return max(
            1, min(self.execution.workers, self.execution.memory_limit // (most + vectors + 20 * BLOCK_ELEMENTS))
        )

    def run(self, wanted: Sequence[Wanted]) -> list[bytes]:
        """The bytes of each site's factors, in order."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self._count(wanted), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                try:
                    return list(pool.map(self._found, wanted))
                except BaseException:
                    self._stop.set()
                    raise
        finally:
            torch.set_num_threads(threads)

    def _found(self, wanted: Wanted) -> bytes:
        if self._stop.is_set():
            return b""
        work: Workspace = self._own.__dict__.setdefault("work", Workspace())
        site = wanted.site
        mu = clamped(equalize(lambda: self._blocks(wanted, work), site.width, site.heads))
        kept = [] if wanted.exact else [read for read in site.givers if len(read.shape) == 1]
        vectors = [(self._vector(read, site.start, site.width), site.base(read)) for read in kept]
        if site.fold.kind == "rows":
            mu = calm_rows(mu)
        elif vectors:
            mu = calm_norm(mu, vectors[0][0].float() + vectors[0][1])
        mu = settled(power_of_two(mu) if wanted.exact else mu, vectors)
        return bytes(bytes_of(mu))

    def _blocks(self, wanted: Wanted, work: Workspace) -> Iterator[tuple[Tensor, int | None]]:
        for driver in wanted.drivers:
            read = driver.read
            rows = open_rows(read, self.files, work, _slab_nbytes(read))
            done = 0
            for first, last in sample(driver, sampled_rows(wanted, driver)):
                if self._stop.is_set():
                    raise InterruptedError
                yield rows.rows(first, last), driver.group_size
                done += last - first
            self.report(Progress(read.name, read.nbytes * done // max(1, read.matrix[0])))

    def _vector(self, read: Read, start: int, count: int) -> Tensor:
        """The part of a stored vector that takes factors, in its own dtype."""
        raw = torch.empty(read.shape, dtype=torch_dtype(read.dtype))
        self.files.read_into(read.file, bytes_of(raw), read.values.offset)
        return raw[start : start + count]


def _slab_nbytes(read: Read) -> int:
    """Room for one run of rows where they are stored transposed."""
    return TURNED_ROWS * 4 * read.matrix[1]


def sample(driver: Driver, count: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring rows, evenly spaced, `count` rows or a few more in all."""
    rows, columns = driver.read.matrix
    run = TURNED_ROWS if driver.read.view.transposed else RUN_ROWS
    run = max(1, min(run, count, BLOCK_ELEMENTS // max(1, columns)))
    runs = -(-count // run)
    if runs * run >= rows:
        yield from ((begin, min(rows, begin + run)) for begin in range(0, rows, run))
        return
    for i in range(runs):
        begin = i * (rows - run) // max(1, runs - 1)
        yield begin, begin + run
