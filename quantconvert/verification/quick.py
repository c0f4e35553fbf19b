"""Tensors of a result against their source without torch: equal bytes, and what C reads (`kernels/native/check.py`).

What it has no way for, and what it doubts, is left to `reference`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from quantconvert.checkpoint.ranges import Files
from quantconvert.kernels.native.check import Checker, Kernel, is_same, judges, packing_of, takes_rows
from quantconvert.kernels.native.template import read_steps
from quantconvert.layouts import LAYOUTS, Stored
from quantconvert.methods import Tolerance
from quantconvert.planning.plan import Execution
from quantconvert.sources import Read
from quantconvert.sources.codes import specs_of
from quantconvert.sources.plain import row_nbytes
from quantconvert.spans import spans
from quantconvert.verification.findings import TensorError
from quantconvert.verification.pairs import Meter, Pair, Values, check_kept
from quantconvert.verification.stored import Buffer, Part, Strip
from quantconvert.verification.tolerances import dtypes_of, relative_of, tiny, tolerance_of

# Bytes of the source's rows that are read at once, rows where more of them share lines of the cache, rows whose
# parameters alone are looked at; bytes of what is stored turned, of one worker and of all.
SLAB_NBYTES, TURNED_ROWS, PARAMETER_ROWS = 1 << 20, 128, 4096
HELD_NBYTES, ALL_HELD_NBYTES = 1 << 24, 1 << 26


class Quick:
    """Checks pairs, for several threads. kernel: the library and its level; None: bytes alone are compared."""

    def __init__(
        self,
        files: Files,
        theirs: Files | None,
        execution: Execution,
        method: str | None,
        kernel: Kernel | None,
    ) -> None:
        self.files, self.theirs, self.method, self.kernel = files, theirs, method, kernel
        self._held_nbytes = min(execution.slab_nbytes, HELD_NBYTES, ALL_HELD_NBYTES // execution.workers)
        self._own = threading.local()

    def peak(self, pair: Pair) -> int:
        """Bytes that a pair takes: a slab of rows, codes of as many, what is unpacked of them, and what is held."""
        row = 4 * pair.tensor.matrix[1]
        return 2 * (SLAB_NBYTES + TURNED_ROWS * row) + self._held_nbytes

    def check(self, pair: Pair) -> Values | None:
        """All that is to be said of a pair; None where another has to say it."""
        if pair.tensor.stored is not None:
            return self._codes(pair)
        return check_kept(pair, self._is_same)

    def _buffer(self, purpose: str) -> Buffer:
        """This thread's buffer for a purpose."""
        buffers: dict[str, Buffer] = self._own.__dict__.setdefault("buffers", {})
        return buffers.setdefault(purpose, Buffer())

    def _is_same(self, tensor: Read, origin: Read, meter: Meter) -> bool | None:
        assert self.theirs
        if origin.is_stored:
            return self._same_bytes(tensor, origin, meter)
        rows, row = origin.matrix[0], max(1, 4 * origin.matrix[1])
        if self.kernel is None or not origin.steps or not takes_rows(origin) or row > SLAB_NBYTES:
            return None
        steps = read_steps(origin, self.theirs)
        ours, theirs = Strip(tensor, self.files, self._buffer("result")), self._strip(origin)
        for begin, end in spans(0, rows, SLAB_NBYTES // row):
            pair = theirs.rows(begin, end), ours.rows(begin, end)
            if not is_same(self.kernel, origin, steps, pair, (begin, end), tensor.dtype):
                return None
            meter.upto(end, rows)
        return True

    def _strip(self, origin: Read) -> Strip:
        assert self.theirs
        return Strip(origin, self.theirs, self._buffer("source"))

    def _same_bytes(self, tensor: Read, origin: Read, meter: Meter) -> bool:
        assert self.theirs
        ours, theirs = self._buffer("bytes of the result"), self._buffer("bytes of the source")
        for begin, end in spans(0, tensor.nbytes, SLAB_NBYTES // 2):
            ours.read(self.files, tensor.file, tensor.values.offset + begin, end - begin)
            theirs.read(self.theirs, origin.file, origin.values.offset + begin, end - begin)
            if not ours.holds(end - begin, theirs):
                return False
            meter.upto(end, tensor.nbytes)
        return True

    def _codes(self, pair: Pair) -> Values | None:
        tensor, origin, meter = pair
        stored, tolerance = tensor.stored, tolerance_of(tensor, origin, self.method)
        assert stored is not None
        packing = packing_of(stored) if self.kernel and judges(tolerance) else None
        if packing is None or (origin and not (takes_rows(origin) and origin.shape == tensor.shape)):
            return None
        assert self.kernel
        steps, least = read_steps(origin or tensor, self.theirs), tiny(dtypes_of(tensor, origin))
        checker = Checker(self.kernel, stored, packing, origin, steps, tolerance, least)
        strip = self._strip(origin) if origin else None
        suffixes = {stored.scale_suffix, *((packing.zeros.suffix,) if packing.zeros else ())}
        parts = self._parts(self.kernel, stored, suffixes | ({packing.codes.suffix} if strip else set()))
        rows = tensor.matrix[0]
        if not all(part.fits(rows) for part in parts):
            return None
        for begin, end in spans(0, rows, self._slab_rows(tensor, origin, parts)):
            blocks = {part.suffix: part.block(begin, end) for part in parts}
            if not checker.check((begin, end), end == rows, strip.rows(begin, end) if strip else None, blocks):
                return None
            meter.upto(end, rows)
        return self._judged(tensor, checker, tolerance) if origin else Values()

    def _parts(self, kernel: Kernel, stored: Stored, suffixes: set[str]) -> list[Part]:
        specs, held = specs_of(stored), self._held_nbytes
        return [
            Part(stored.refs[suffix], specs[suffix], self.files, self._buffer(f"stored {suffix}"), held, kernel)
            for suffix in sorted(suffixes)
        ]

    def _slab_rows(self, tensor: Read, origin: Read | None, parts: Sequence[Part]) -> int:
        """Rows that are checked in one call."""
        assert tensor.stored is not None
        if origin is None:
            return PARAMETER_ROWS
        multiple = LAYOUTS[tensor.stored.layout].row_multiple(tensor.stored.scheme)
        fit = SLAB_NBYTES // max(1, row_nbytes(origin)) // multiple * multiple
        least = TURNED_ROWS if any(part.spec.transposed for part in parts) else multiple
        return max(fit, least)

    def _judged(self, tensor: Read, checker: Checker, tolerance: Tolerance) -> Values | None:
        """How far a weight is that has passed; None where its error is no number, or larger than it may be."""
        assert tensor.stored is not None
        error = checker.error
        if error is None or (tolerance.relative is not None and relative_of(*error[1:]) > tolerance.relative):
            return None
        return Values(errors=[TensorError.of(tensor.name, tensor.stored.scheme.label, *error)])
