"""The first pass of a conversion: importances and factors, kept before any weight is changed.

What it finds does not depend on the number of workers, and is synced under its final name: a run that continues
another uses the factors of that one. Imports torch only for what no kernel takes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from quantconvert.checkpoint import Repo, TensorRef
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.events import Progress, Reporter, Started
from quantconvert.factors import FACTORS, IMPORTANCES, VectorFile, Wanted, beside, place_vectors, read_places
from quantconvert.factors.sampling import RUN_ELEMENTS, sample, slab_nbytes
from quantconvert.factors.wanted import PASSES, sampled_rows
from quantconvert.kernels import Unread, find_equalizer
from quantconvert.lazy import load_torch
from quantconvert.machine import sync
from quantconvert.planning import Execution, Plan
from quantconvert.run.disk import fsync_folder, write_all
from quantconvert.run.ledger import one_at_a_time
from quantconvert.run.phases import bag_started, factors_started
from quantconvert.run.spool import Hold, direct, holding, items_of_factors
from quantconvert.sources import Read, cost_of
from quantconvert.spans import spans

if TYPE_CHECKING:
    from quantconvert.run.recipes import Recipes

# What a column takes beside its blocks: factors, sums, and the candidates of `settled`.
VECTOR_BYTES = 1500


def first_needs_torch(plan: Plan) -> bool:
    """Whether importances or factors of a plan are torch's to find."""
    if plan.knowledge is not None and plan.knowledge.walk is not None:
        return True
    equalizer, wanted = find_equalizer(), plan.factors.wanted if plan.factors else ()
    return any(equalizer is None or not equalizer.takes(item) for item in wanted)


def first_pass(plan: Plan, repo: Repo, folder: Path, is_begun: bool, report: Reporter) -> None:
    """Write the plan's importances and factors into `folder`, unless an interrupted run has.

    is_begun: whether tasks of that run are done, which used them. Raises `OutputError` where these are gone, and what
    reading the source raises.
    """
    report = one_at_a_time(report)
    known = beside(folder, plan.statistics.path if plan.statistics else None)
    with closing(Files(direct(repo), known)) as files:  # a bag of tokens goes its own way through the source
        _find_importances(plan, files, folder, is_begun, report)
    with closing(Files(repo, known)) as files:
        _find_factors(plan, repo, files, folder, is_begun, report)


def _find_importances(plan: Plan, files: Files, folder: Path, is_begun: bool, report: Reporter) -> None:
    knowledge = plan.knowledge
    if knowledge is None or knowledge.walk is None or knowledge.file is None:
        return
    walk, file = knowledge.walk, knowledge.file
    if _is_there(IMPORTANCES, place_vectors(file, IMPORTANCES), folder, is_begun):
        return
    _tell(report, bag_started(plan))
    load_torch()
    from quantconvert.buffers import bytes_of
    from quantconvert.factors.bag import bag

    found = bag(walk, files, plan.execution, lambda name, nbytes: report(Progress(name, nbytes)))
    _write(folder, IMPORTANCES, file, (bytes_of(found[name]) for name, _ in file.vectors))


def _find_factors(plan: Plan, repo: Repo, files: Files, folder: Path, is_begun: bool, report: Reporter) -> None:
    factors = plan.factors
    if factors is None or _is_there(FACTORS, [wanted.place for wanted in factors.wanted], folder, is_begun):
        return
    _tell(report, factors_started(plan))
    one = _Pass(files, plan.execution, report)
    with holding(repo, lambda: items_of_factors(plan), one.pulse) as hold, one.run(factors.wanted, hold) as found:
        _write(folder, FACTORS, factors.file, found)


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
    """Sites, as many at once as there are workers."""

    def __init__(self, files: Files, execution: Execution, report: Reporter) -> None:
        self.files, self.execution, self.report = files, execution, report
        self.equalizer = find_equalizer()
        self._recipes: Recipes | None = None
        self._stop = threading.Event()

    def _count(self, wanted: Sequence[Wanted]) -> int:
        """Workers: as many as there is memory for."""
        most = max(cost_of(d.read, slab_nbytes(d.read)).held for w in wanted for d in w.drivers)
        vectors = max(VECTOR_BYTES * w.drivers[0].read.matrix[1] for w in wanted)
        return max(1, min(self.execution.workers, self.execution.memory_limit // (most + vectors + 20 * RUN_ELEMENTS)))

    @contextmanager
    def run(self, wanted: Sequence[Wanted], hold: Hold) -> Iterator[Iterator[memoryview]]:
        """Each site's factors, in order, as they are found: float32."""

        def found(item: int, one: Wanted) -> memoryview:
            hold.need(item)
            factors = self._found(one)
            hold.done(item)
            return factors

        with self._pool(wanted) as pool:
            try:
                yield pool.map(found, range(len(wanted)), wanted)
            except BaseException:
                self._stop.set()
                raise

    @contextmanager
    def _pool(self, wanted: Sequence[Wanted]) -> Iterator[ThreadPoolExecutor]:
        """Its threads, in each of which torch is single-threaded, if there is something for it."""
        if all(map(self._is_native, wanted)):
            with ThreadPoolExecutor(self._count(wanted)) as pool:
                yield pool
            return
        load_torch()
        from quantconvert.run.recipes import Recipes
        from quantconvert.workers import worker_pool

        self._recipes = Recipes(self.files, self._advance)
        with worker_pool(self._count(wanted)) as pool:
            yield pool

    def _is_native(self, wanted: Wanted) -> bool:
        """Whether the kernel takes it, and its files are on this machine."""
        if self.equalizer is None or not self.equalizer.takes(wanted):
            return False
        return all(self.files.fd(driver.read.file) is not None for driver in wanted.drivers)

    def pulse(self) -> None:
        """Called while it waits; raises where the run has ended."""
        if self._stop.is_set():
            raise InterruptedError

    def _advance(self, read: Read, nbytes: int) -> None:
        self.pulse()
        if nbytes:
            self.report(Progress(read.name, nbytes))

    def _found(self, wanted: Wanted) -> memoryview:
        self.pulse()
        if self.equalizer is None or not self._is_native(wanted):
            assert self._recipes is not None
            return self._recipes.factors(wanted)
        try:
            found = self.equalizer.factors(wanted, self.files)
        except Unread as error:
            self._read_again(error.args[0])
        for driver, rows in sampled_rows(wanted):
            read, count = driver.read, sample(driver.read, rows).count
            for _ in range(PASSES):
                self._advance(read, read.nbytes * count // max(1, read.matrix[0]))
        return found

    def _read_again(self, read: Read) -> NoReturn:
        """Raise what is wrong with a weight that could not be read."""
        ref, buffer = read.values, memoryview(bytearray(1 << 20))
        for begin, end in spans(0, ref.nbytes, len(buffer)):
            self.files.read_into(ref.file, buffer[: end - begin], ref.offset + begin)
        raise CheckpointError(f"cannot read `{ref.name}` in `{ref.file}`")
