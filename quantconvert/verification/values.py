"""Every tensor of a result: its codes alone, or its values against the source, a block of rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint import LocalFolder, Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import QuantConvertError
from quantconvert.events import Progress, Reporter, Started, silent
from quantconvert.factors import FACTORS
from quantconvert.job import Limits
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS, Tolerance
from quantconvert.planning.memory import cut, execution_for
from quantconvert.planning.plan import Execution
from quantconvert.sources import Read, Sources, as_stored, cost_of, open_rows
from quantconvert.sources.blocks import BlockReader
from quantconvert.sources.rows import read_vector, tiles
from quantconvert.spans import spans
from quantconvert.verification.findings import Check, Finding, TensorError
from quantconvert.verification.weights import FOREIGN, Errors, range_problem
from quantconvert.workers import worker_pool

_CHUNK = 1 << 22


@dataclass(slots=True)
class Values:
    """What was found: how many tensors equal their source, how far the weights are, and everything that is wrong."""

    num_equal: int = 0
    errors: list[TensorError] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, check: Check, where: str, message: str) -> None:
        self.findings.append(Finding(check, where, message))


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
    another tool.
    """
    execution = execution_for(limits)
    found = Values()
    pairs = list(_pairs(tensors, source[1] if source else None, found))
    report(Started(len(pairs), sum(tensor.nbytes for tensor, _ in pairs), "checking"))
    files, theirs = Files(LocalFolder(out)), Files(source[0], {FACTORS: out / FACTORS}) if source else None
    check = _Checker(files, theirs, execution, method, report)
    try:
        for part in check.run(pairs):
            found.num_equal += part.num_equal
            found.errors += part.errors
            found.findings += part.findings
    finally:
        files.close()
        if theirs:
            theirs.close()
    return found


def _pairs(tensors: Sequence[Read], sources: Sources | None, found: Values) -> Iterator[tuple[Read, Read | None]]:
    """Each tensor with its origin; what one side has and the other lacks is a finding."""
    known = {source.name: source for source in sources.reads} if sources else {}
    for tensor in tensors:
        origin = known.pop(tensor.name, None)
        if sources and origin is None:
            origin = _fused(known, tensor)
        if sources and origin is None:
            found.add("values", tensor.name, "is not in the source")
        else:
            yield tensor, origin
    used = {tensor.name for tensor in tensors}
    for name, source in known.items():
        if name not in used and source.values.name not in used:
            found.add("values", name, "is in the source, but not in the result")


def _fused(known: dict[str, Read], tensor: Read) -> Read | None:
    """The stored tensor that holds several weights of the source, where the result kept it as it is."""
    part = next((s for s in known.values() if s.values.name == tensor.name), None)
    return as_stored(part.values) if part else None


class _Checker:
    """Checks pairs with as many threads as workers and memory allow; torch runs single-threaded in each."""

    def __init__(
        self, files: Files, theirs: Files | None, execution: Execution, method: str | None, report: Reporter
    ) -> None:
        self.files, self.theirs, self.execution, self.method = files, theirs, execution, method
        self._report, self._lock = report, threading.Lock()
        self._stop = threading.Event()
        self._own = threading.local()

    def run(self, pairs: Sequence[tuple[Read, Read | None]]) -> Iterator[Values]:
        """What each pair shows, in order."""
        most = max((self._peak(tensor, origin) for tensor, origin in pairs), default=1)
        workers = max(1, min(self.execution.workers, self.execution.memory_limit // max(1, most), len(pairs)))
        with worker_pool(workers) as pool:
            try:
                yield from pool.map(self._checked, pairs)
            except BaseException:
                self._stop.set()
                raise

    def _peak(self, tensor: Read, origin: Read | None) -> int:
        """Bytes that a pair takes: both are decoded side by side, but for equal bytes."""
        if tensor.stored is None and (origin is None or origin.is_stored):
            return 2 * _CHUNK
        return sum(cut(read, read.matrix, 0, 1, self.execution).peak_nbytes for read in (tensor, origin) if read)

    def _checked(self, pair: tuple[Read, Read | None]) -> Values:
        tensor, origin = pair
        found = Values()
        if not self._stop.is_set():
            try:
                self._check(tensor, origin, found)
            except QuantConvertError as error:
                found.add("values", tensor.name, error.message)
        return found

    def _advance(self, name: str, nbytes: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._lock:
            self._report(Progress(name, nbytes))

    def _work(self, purpose: str) -> Workspace:
        """This thread's buffers: the result's and the source's are apart."""
        spaces: dict[str, Workspace] = self._own.__dict__.setdefault("spaces", {})
        return spaces.setdefault(purpose, Workspace())

    def _check(self, tensor: Read, origin: Read | None, found: Values) -> None:
        if tensor.stored is not None:
            self._codes(tensor, origin, found)
        elif origin is not None:
            before = len(found.findings)
            if not self._is_same(tensor, origin, found):
                found.add("values", tensor.name, "differs from the source, which it should equal")
            found.num_equal += len(found.findings) == before
            self._advance(tensor.name, tensor.nbytes)

    def _is_same(self, tensor: Read, origin: Read, found: Values) -> bool:
        """A tensor in high precision: the source's bytes, or its values decoded, changed and rounded once."""
        assert self.theirs
        if origin.encoding == "plain" and origin.view.expert is None and not origin.steps:
            origin = as_stored(origin.values)  # stored transposed, and kept so
        if tensor.shape != origin.shape:
            found.add("values", tensor.name, f"expected shape {list(origin.shape)}, got {list(tensor.shape)}")
            return True
        if origin.is_stored:
            return tensor.dtype == origin.dtype and self._same_bytes(tensor, origin)
        if (origin.steps or len(origin.shape) == 1) and tensor.dtype != origin.dtype:
            return False
        if len(origin.shape) == 1 and not origin.steps:
            raw = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            self.files.read_into(tensor.file, bytes_of(raw), tensor.values.offset)
            return bytes_of(raw) == bytes_of(read_vector(origin, self.theirs))
        return self._same_values(tensor, origin)

    def _same_bytes(self, tensor: Read, origin: Read) -> bool:
        assert self.theirs
        work = self._work("result")
        for begin, end in spans(0, tensor.nbytes, _CHUNK):
            mine = work.tensor("mine", torch.uint8, (end - begin,))
            other = work.tensor("theirs", torch.uint8, (end - begin,))
            self.files.read_into(tensor.file, bytes_of(mine), tensor.values.offset + begin)
            self.theirs.read_into(origin.file, bytes_of(other), origin.values.offset + begin)
            if not torch.equal(mine, other):
                return False
            self._advance(tensor.name, 0)
        return True

    def _same_values(self, tensor: Read, origin: Read) -> bool:
        assert self.theirs
        slab = self.execution.slab_nbytes
        mine = open_rows(tensor, self.files, self._work("result"), slab)
        theirs = open_rows(origin, self.theirs, self._work("source"), slab)
        tile_rows = cut(origin, origin.matrix, 0, 1, self.execution).tile_rows
        for first, w_OI in tiles(theirs, 0, origin.matrix[0], tile_rows):
            expected = w_OI.to(torch_dtype(tensor.dtype)).float()
            if not torch.allclose(mine.rows(first, first + len(w_OI)), expected, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def _tolerance(self, tensor: Read, origin: Read | None) -> Tolerance:
        if self.method is None or tensor.stored is None:
            return FOREIGN
        dtype = origin.dtype if origin else tensor.dtype
        return METHODS[self.method].tolerance(tensor.stored.scheme, dtype, tensor.dtype)

    def _codes(self, tensor: Read, origin: Read | None, found: Values) -> None:
        stored = tensor.stored
        assert stored is not None
        if origin is not None and origin.shape != tensor.shape:
            found.add("values", tensor.module, f"expected shape {list(origin.shape)}, got {list(tensor.shape)}")
            return
        layout, tolerance = LAYOUTS[stored.layout], self._tolerance(tensor, origin)
        reader = BlockReader(stored, self.files, self._work("result"))
        theirs, multiple = None, 1
        if origin is not None and self.theirs:
            theirs = open_rows(origin, self.theirs, self._work("source"), self.execution.slab_nbytes)
            multiple = cost_of(origin, self.execution.slab_nbytes).row_multiple
        errors = Errors(stored.scheme, tolerance, (origin.dtype if origin else tensor.dtype, tensor.dtype))
        rows, reported = tensor.matrix[0], 0
        for begin, end in spans(0, rows, cut(tensor, tensor.matrix, 0, multiple, self.execution).tile_rows):
            quantized = reader.quantized(begin, end)
            problem = range_problem(quantized, tolerance)
            if problem:
                found.add("codes", tensor.module, f"rows {begin} to {end - 1}: {problem}")
                return
            if theirs is not None:
                errors.add(theirs.rows(begin, end), layout.dequantize(quantized), quantized)
            self._advance(tensor.name, tensor.nbytes * end // rows - reported)
            reported = tensor.nbytes * end // rows
        if origin is not None:
            self._judge(tensor, errors, origin.stored is None, found)

    def _judge(self, tensor: Read, errors: Errors, judge_scales: bool, found: Values) -> None:
        result, problem = errors.result(tensor.name), errors.problem(judge_scales)
        if result is not None:
            found.errors.append(result)
        if problem:
            found.add("values", tensor.module, problem)


class _Stopped(Exception):
    """Another worker failed, or the user interrupted."""
