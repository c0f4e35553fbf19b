"""What quantization takes from each weight under two schemes, from a sample of its rows (`--target-bits`).

The weights are measured as they are stored, by round to nearest, before any step has changed them. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, torch_dtype
from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.events import Progress, Reporter, Started
from quantconvert.factors.sampling import sample
from quantconvert.factors.wanted import SAMPLED_ROWS
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import DEFAULT_METHOD, METHODS, Noise, NonFinite
from quantconvert.planning import Execution
from quantconvert.planning.budget import Offer
from quantconvert.run.complaints import nonfinite_error
from quantconvert.run.tiled import count_nonfinite
from quantconvert.schemes import Scheme
from quantconvert.sources import Read, open_rows
from quantconvert.sources.rows import Rows
from quantconvert.workers import single_threaded


def measure(offer: Offer, repo: Repo, execution: Execution, report: Reporter) -> dict[str, tuple[float, float, float]]:
    """By weight: the sums of squares of its sampled rows, and of their errors at the base and at the raised scheme.

    Raises `CheckpointError` for a weight that holds NaN or Inf.
    """
    tasks = [task for found in offer.sets for task in found.tasks]
    report(Started(len(tasks), sum(task.source.nbytes for task in tasks), "measuring"))
    files, work, result = Files(repo), Workspace(), {}
    try:
        with single_threaded():  # sums are those of one thread, whatever the machine has
            for task in tasks:
                read = replace(task.source, steps=())
                rows = open_rows(read, files, work, execution.slab_nbytes)

                def blocks(read: Read = read, rows: Rows = rows) -> Iterator[Tensor]:
                    for first, last in sample(read, min(SAMPLED_ROWS, read.matrix[0])):
                        yield rows.rows(first, last)

                try:
                    (signal, base), (_, raised) = (_noise(read, s, blocks, offer) for s in (offer.base, offer.raised))
                except NonFinite:
                    raise nonfinite_error(read, count_nonfinite(rows, read)) from None
                result[read.name] = (signal, base, raised)
                report(Progress(read.name, read.nbytes))
    finally:
        files.close()
    return result


def _noise(read: Read, scheme: Scheme, blocks: Callable[[], Iterator[Tensor]], offer: Offer) -> tuple[float, float]:
    """Sums of squares of the rows, and of the error that one scheme makes."""
    method = METHODS[DEFAULT_METHOD]
    dtype, scale_dtype = torch_dtype(read.dtype), torch_dtype(LAYOUTS[offer.layout].scale_dtype(read.dtype))
    noise, span = Noise(torch.empty), method.span(blocks(), scheme)
    for w_OI in blocks():
        method.quantize(w_OI, scheme, dtype, scale_dtype, span, noise)
    return noise.signal, noise.noise
