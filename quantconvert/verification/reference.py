"""Tensors of a result against their source, a block of rows at a time. Imports torch.

It takes whatever is stored, and is the last to judge what `quick` doubts.
"""

from __future__ import annotations

import threading

import torch

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint.ranges import Files
from quantconvert.layouts import LAYOUTS
from quantconvert.planning.memory import cut
from quantconvert.planning.plan import Execution
from quantconvert.sources import Read, cost_of, open_rows
from quantconvert.sources.blocks import BlockReader
from quantconvert.sources.rows import read_vector, tiles
from quantconvert.spans import spans
from quantconvert.verification.pairs import Meter, Pair, Values, check_kept
from quantconvert.verification.tolerances import dtypes_of, tolerance_of
from quantconvert.verification.weights import Errors, range_problem


class Reference:
    """Checks pairs, for several threads in each of which torch is single-threaded. theirs: the source's files."""

    def __init__(self, files: Files, theirs: Files | None, execution: Execution, method: str | None) -> None:
        self.files, self.theirs, self.execution, self.method = files, theirs, execution, method
        self._own = threading.local()

    def peak(self, pair: Pair) -> int:
        """Bytes that a pair takes: both are decoded side by side."""
        reads = (pair.tensor, pair.origin)
        return sum(cut(read, read.matrix, 0, 1, self.execution).peak_nbytes for read in reads if read)

    def check(self, pair: Pair) -> Values:
        """All that is to be said of a pair."""
        if pair.tensor.stored is not None:
            return self._codes(pair)
        found = check_kept(pair, self._is_same)
        assert found is not None
        return found

    def _work(self, purpose: str) -> Workspace:
        """This thread's buffers: the result's and the source's are apart."""
        spaces: dict[str, Workspace] = self._own.__dict__.setdefault("spaces", {})
        return spaces.setdefault(purpose, Workspace())

    def _is_same(self, tensor: Read, origin: Read, meter: Meter) -> bool:
        assert self.theirs
        if len(origin.shape) == 1 and not origin.steps:
            raw = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            self.files.read_into(tensor.file, bytes_of(raw), tensor.values.offset)
            return bytes_of(raw) == bytes_of(read_vector(origin, self.theirs))
        slab, rows = self.execution.slab_nbytes, origin.matrix[0]
        mine = open_rows(tensor, self.files, self._work("result"), slab)
        theirs = open_rows(origin, self.theirs, self._work("source"), slab)
        tile_rows = cut(origin, origin.matrix, 0, 1, self.execution).tile_rows
        for first, w_OI in tiles(theirs, 0, rows, tile_rows):
            expected = w_OI.to(torch_dtype(tensor.dtype)).float()
            if not torch.allclose(mine.rows(first, first + len(w_OI)), expected, rtol=0, atol=0, equal_nan=True):
                return False
            meter.upto(first + len(w_OI), rows)
        return True

    def _codes(self, pair: Pair) -> Values:
        (tensor, origin, meter), found = pair, Values()
        stored = tensor.stored
        assert stored is not None
        if origin is not None and origin.shape != tensor.shape:
            found.add("values", tensor.module, f"expected shape {list(origin.shape)}, got {list(tensor.shape)}")
            return found
        layout, tolerance = LAYOUTS[stored.layout], tolerance_of(tensor, origin, self.method)
        reader = BlockReader(stored, self.files, self._work("result"))
        theirs, multiple = None, 1
        if origin is not None and self.theirs:
            theirs = open_rows(origin, self.theirs, self._work("source"), self.execution.slab_nbytes)
            multiple = cost_of(origin, self.execution.slab_nbytes).row_multiple
        errors = Errors(stored.scheme, tolerance, dtypes_of(tensor, origin))
        rows = tensor.matrix[0]
        for begin, end in spans(0, rows, cut(tensor, tensor.matrix, 0, multiple, self.execution).tile_rows):
            quantized = reader.quantized(begin, end)
            problem = range_problem(quantized, tolerance)
            if problem:
                found.add("codes", tensor.module, f"rows {begin} to {end - 1}: {problem}")
                return found
            if theirs is not None:
                errors.add(theirs.rows(begin, end), layout.dequantize(quantized), quantized)
            meter.upto(end, rows)
        if origin is not None:
            _judge(tensor, errors, origin.stored is None, found)
        return found


def _judge(tensor: Read, errors: Errors, judge_scales: bool, found: Values) -> None:
    result, problem = errors.result(tensor.name), errors.problem(judge_scales)
    if result is not None:
        found.errors.append(result)
    if problem:
        found.add("values", tensor.module, problem)
