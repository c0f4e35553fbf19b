"""What a task is told of its weight's input: as the source's model has it, and then as factors have left it.

Imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantconvert.buffers import bytes_of
from quantconvert.checkpoint import TensorRef
from quantconvert.methods import METHODS, Inputs
from quantconvert.planning import Quantize
from quantconvert.sources.rows import Files
from quantconvert.sources.steps.scale import Scale


def read_floats(ref: TensorRef, files: Files) -> Tensor:
    """A float32 tensor as it is stored."""
    values = torch.empty(ref.shape)
    files.read_into(ref.file, bytes_of(values), ref.offset)
    return values


def inputs_of(task: Quantize, files: Files) -> Inputs | None:
    """What the task's method needs, None where that is nothing; inputs take the factors that columns are divided by."""
    needs, known = METHODS[task.method].needs, task.known
    if needs == "nothing":
        return None
    importance = read_floats(known.importance, files) if known.importance else None
    moments = read_floats(known.moments, files) if known.moments and needs == "moments" else None
    for factors in _factors(task, files):
        if importance is not None:
            importance.mul_(factors).mul_(factors)
        if moments is not None:
            moments.mul_(factors).mul_(factors[:, None])
    return Inputs(importance, moments)


def input_max_of(task: Quantize, files: Files) -> float | None:
    """max |x| of the task's input, where that gets a stored scale."""
    if task.input_max is None:  # before factors are read: so it is with nearly all tasks
        return None
    factors = _factors(task, files)
    if not factors:
        return task.input_max
    assert task.known.maxima is not None
    maxima = read_floats(task.known.maxima, files)
    for factor in factors:
        maxima.mul_(factor)
    return float(maxima.max())


def _factors(task: Quantize, files: Files) -> list[Tensor]:
    """What the input's channels are multiplied by, each [I]."""
    steps = [step for step in task.source.steps if isinstance(step, Scale) and step.way == "columns"]
    return [step.read(files) for step in steps]
