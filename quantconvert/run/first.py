"""The first pass of a conversion: importances and factors, kept before any weight is changed.

What it finds does not depend on the number of workers, and is synced under its final name: a run that continues
another uses the factors of that one. Imports torch.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.checkpoint import Repo, TensorRef
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.events import Progress, Reporter, Started
from quantconvert.factors import FACTORS, IMPORTANCES, VectorFile, Wanted, beside, place_vectors, read_places
from quantconvert.factors.bag import bag
from quantconvert.factors.recipe import (
    calm_norm,
    calm_rows,
    clamped,
    combined,
    equalize,
    joint,
    largest,
    power_of_two,
    settled,
    smooth,
)
from quantconvert.factors.wanted import sampled_rows
from quantconvert.machine import sync
from quantconvert.planning import Execution, Plan
from quantconvert.run.disk import fsync_folder, write_all
from quantconvert.run.knowing import read_floats
from quantconvert.run.ledger import one_at_a_time
from quantconvert.run.phases import bag_started, factors_started
from quantconvert.sources import Read, cost_of, open_rows
from quantconvert.sources.rows import read_vector
from quantconvert.workers import worker_pool

# Rows that are read at once: neighbours cost one read, and what is stored transposed is read in strips.
RUN_ROWS, TURNED_ROWS = 8, 64
# Elements of float32 that a block holds.
BLOCK_ELEMENTS = 1 << 18
# What a column takes beside its blocks: factors, sums, and the candidates of `settled`.
VECTOR_BYTES = 1500


def first_pass(plan: Plan, repo: Repo, folder: Path, is_begun: bool, report: Reporter) -> None:
    """Write the plan's importances and factors into `folder`, unless an interrupted run has.

    is_begun: whether tasks of that run are done, which used them. Raises `OutputError` where these are gone, and what
    reading the source raises.
    """
    report = one_at_a_time(report)
    files = Files(repo, beside(folder, plan.statistics.path if plan.statistics else None))
    try:
        _find_importances(plan, files, folder, is_begun, report)
        _find_factors(plan, files, folder, is_begun, report)
    finally:
        files.close()


def _find_importances(plan: Plan, files: Files, folder: Path, is_begun: bool, report: Reporter) -> None:
    knowledge = plan.knowledge
    if knowledge is None or knowledge.walk is None or knowledge.file is None:
        return
    walk, file = knowledge.walk, knowledge.file
    if _is_there(IMPORTANCES, place_vectors(file, IMPORTANCES), folder, is_begun):
        return
    _tell(report, bag_started(plan))
    found = bag(walk, files, plan.execution, lambda name, nbytes: report(Progress(name, nbytes)))
    _write(folder, IMPORTANCES, file, (bytes_of(found[name]) for name, _ in file.vectors))


def _find_factors(plan: Plan, files: Files, folder: Path, is_begun: bool, report: Reporter) -> None:
    factors = plan.factors
    if factors is None or _is_there(FACTORS, [wanted.place for wanted in factors.wanted], folder, is_begun):
        return
    _tell(report, factors_started(plan))
    with _Pass(files, plan.execution, report).run(factors.wanted) as found:
        _write(folder, FACTORS, factors.file, (bytes_of(mu) for mu in found))


def _tell(report: Reporter, event: Started | None) -> None:
    if event is not None:
        report(event)


def _write(folder: Path, name: str, file: VectorFile, vectors: Iterable[memoryview]) -> None:
    """Complete and on disk, or not there; one vector at a time, as those of many experts are large together."""
    partial, digest = folder / f"{name}.partial", hashlib.sha256()
    with _writing(name):
        fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        for place, vector in zip(place_vectors(file, name), vectors, strict=True):
            assert len(vector) == place.nbytes, place.name
            digest.update(vector)
            with _writing(name):
                write_all(fd, vector, place.offset)
        with _writing(name):
            write_all(fd, memoryview(file.header(digest.hexdigest())), 0)
            sync(fd)
    finally:
        os.close(fd)
    with _writing(name):
        partial.replace(folder / name)
        fsync_folder(folder)


@contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write `{name}`: {error.strerror}") from error


def _is_there(name: str, places: Sequence[TensorRef], folder: Path, is_begun: bool) -> bool:
    try:
        found = [*read_places(folder, name, 0.0 if name == FACTORS else -1.0).values()] == list(places)
    except CheckpointError:
        found = False
    if is_begun and not found:
        raise OutputError(f"`{name}` of the interrupted run is gone", hint="--restart starts over")
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

    @contextmanager
    def run(self, wanted: Sequence[Wanted]) -> Iterator[Iterator[Tensor]]:
        """Each site's factors, in order, as they are found."""
        with worker_pool(self._count(wanted)) as pool:
            try:
                yield pool.map(self._found, wanted)
            except BaseException:
                self._stop.set()
                raise

    def _found(self, wanted: Wanted) -> Tensor:
        if self._stop.is_set():
            raise InterruptedError
        work: Workspace = self._own.__dict__.setdefault("work", Workspace())
        site = wanted.site
        mu = self._factors(wanted, work)
        kept = [] if wanted.exact else [read for read in site.givers if len(read.shape) == 1]
        part = slice(site.start, site.start + site.width)
        vectors = [(read_vector(read, self.files)[part], site.base(read)) for read in kept]
        if site.fold.kind == "rows":
            mu = calm_rows(mu)
        elif vectors:
            mu = calm_norm(mu, vectors[0][0].float() + vectors[0][1])
        return settled(power_of_two(mu) if wanted.exact else mu, vectors).contiguous()

    def _factors(self, wanted: Wanted, work: Workspace) -> Tensor:
        """mu [C] by the site's recipe, before what gives the vector has a say."""
        site = wanted.site
        if wanted.recipe == "smooth":
            known = [read_floats(ref, self.files) for ref in wanted.maxima or wanted.importances]
            maxima_x = torch.stack(known).amax(0)
            maxima_w = largest((block for block, _ in self._blocks(wanted, work)), len(maxima_x))
            pair = [site.heads.largest(m) if site.heads else m for m in (maxima_x, maxima_w)]
            return smooth(pair[0] if wanted.maxima else pair[0].sqrt(), pair[1], wanted.alpha)
        mu = equalize(lambda: self._blocks(wanted, work), site.width, site.heads)
        if not wanted.importances:
            return clamped(mu)
        h = joint(read_floats(ref, self.files) for ref in wanted.importances)
        return combined(mu, site.heads.gathered(h) if site.heads else h)

    def _blocks(self, wanted: Wanted, work: Workspace) -> Iterator[tuple[Tensor, int | None]]:
        for driver in wanted.drivers:
            read = driver.read
            rows = open_rows(read, self.files, work, _slab_nbytes(read))
            done = 0
            for first, last in sample(read, sampled_rows(wanted, driver)):
                if self._stop.is_set():
                    raise InterruptedError
                yield rows.rows(first, last), driver.group_size
                done += last - first
            self.report(Progress(read.name, read.nbytes * done // max(1, read.matrix[0])))


def _slab_nbytes(read: Read) -> int:
    """Room for one run of rows where they are stored transposed."""
    return TURNED_ROWS * 4 * read.matrix[1]


def sample(read: Read, count: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring rows of a weight, evenly spaced, `count` rows or a few more in all."""
    rows, columns = read.matrix
    run = TURNED_ROWS if read.view.transposed else RUN_ROWS
    run = max(1, min(run, count, BLOCK_ELEMENTS // max(1, columns)))
    runs = -(-count // run)
    if runs * run >= rows:
        yield from ((begin, min(rows, begin + run)) for begin in range(0, rows, run))
        return
    for i in range(runs):
        begin = i * (rows - run) // max(1, runs - 1)
        yield begin, begin + run
