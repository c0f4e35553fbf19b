"""One tensor-parallel rank's share of a conversion, in memory, for engines that quantize while they load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, UnsupportedError, some
from quantconvert.events import silent
from quantconvert.factors import beside
from quantconvert.families import Classifier
from quantconvert.families.parallel import merged_layers, part_of
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS, BadInputs, Inputs, NonFinite, ScaleOverflow
from quantconvert.planning import Copy, Decode, Plan, Quantize, Split, Task
from quantconvert.planning.memory import cut
from quantconvert.run.complaints import inputs_error, nonfinite_error, overflow_error
from quantconvert.run.first import first_pass
from quantconvert.run.knowing import input_max_of, inputs_of
from quantconvert.run.tiled import count_nonfinite, plain
from quantconvert.sources import open_rows
from quantconvert.sources.rows import read_vector, tiles
from quantconvert.spans import spans


def iter_rank(plan: Plan, repo: Repo, rank: int, size: int, merged: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of rank `rank` of `size`: quantized weights sharded first, everything else whole.

    merged: layers that engines load as one are quantized as one matrix, their shares one above the other. Raises
    `UnsupportedError` before the first tensor where their dtypes differ.
    """
    return _rank(plan, repo, rank, size, _units(plan, merged))


# By the name of the task that comes first: the module's name in the result, and the weights that it consists of.
Units = Mapping[str, tuple[str, tuple[Quantize, ...]]]


def _units(plan: Plan, merged: bool) -> Units:
    divided = [task.source.module for task in plan.tasks if isinstance(task, Quantize) and task.siblings]
    if divided:
        raise UnsupportedError(
            f"weights that share what divides their scales cannot be quantized one by one: {some(divided)}",
            hint="convert to a folder first, or another scheme",
        )
    tasks = {task.source.module: task for task in plan.tasks if isinstance(task, Quantize)}
    layers = merged_layers(tasks, Classifier(plan.checkpoint).fused) if merged else {}
    alone = set(tasks).difference(*layers.values())
    units = {name: tuple(tasks[member] for member in members) for name, members in layers.items()}
    mixed = [name for name, parts in units.items() if len({part.source.dtype for part in parts}) > 1]
    if mixed:
        raise UnsupportedError(
            f"weights of several dtypes cannot be merged before they are quantized: {some(mixed)}", hint="merged=False"
        )
    order = {module: i for i, module in enumerate(tasks)}
    units |= {module: (tasks[module],) for module in alone}
    first = {name: min((p.source.module for p in parts), key=order.__getitem__) for name, parts in units.items()}
    return {first[name]: (name, parts) for name, parts in units.items()}


def _rank(plan: Plan, repo: Repo, rank: int, size: int, units: Units) -> Iterator[tuple[str, Tensor]]:
    with TemporaryDirectory() as folder:
        first_pass(plan, repo, Path(folder), False, silent)
        statistics = plan.statistics.path if plan.statistics else None
        yield from _tensors(plan, Files(repo, beside(Path(folder), statistics)), rank, size, units)


def _tensors(plan: Plan, files: Files, rank: int, size: int, units: Units) -> Iterator[tuple[str, Tensor]]:
    work = Workspace()
    try:
        for task in plan.tasks:
            if not isinstance(task, Quantize):
                yield task.source.name, _whole(files, work, task, plan)
            elif task.source.module in units:
                name, parts = units[task.source.module]
                yield from _quantized(files, plan, name, parts, rank, size).items()
    finally:
        files.close()


def _whole(files: Files, work: Workspace, task: Task, plan: Plan) -> Tensor:
    source = task.source
    if isinstance(task, Split):
        return read_vector(source, files)
    tensor = torch.empty(source.shape, dtype=torch_dtype(source.dtype))
    if isinstance(task, Copy):
        if tensor.numel():
            files.read_into(source.file, bytes_of(tensor), source.values.offset)
        return tensor
    assert isinstance(task, Decode)
    rows = open_rows(source, files, work, plan.execution.slab_nbytes)
    for first, w_OI in tiles(rows, 0, source.matrix[0], task.cut.tile_rows):
        tensor.view(source.matrix)[first : first + w_OI.shape[0]] = plain(task, w_OI, tensor.dtype, rows)
    return tensor


def _part_of_inputs(inputs: Inputs | None, columns: tuple[int, int] | None) -> Inputs | None:
    """What is known of the columns of one rank."""
    if inputs is None or columns is None:
        return inputs
    part = slice(*columns)
    importance = None if inputs.importance is None else inputs.importance[part].contiguous()
    return Inputs(importance, None if inputs.moments is None else inputs.moments[part, part].contiguous())


def _quantized(
    files: Files, plan: Plan, name: str, parts: Sequence[Quantize], rank: int, size: int
) -> dict[str, Tensor]:
    """The tensors of one module of the result, whose weight is that of `parts` one above the other: all read one input,
    of which the first knows what any does.
    """
    task = parts[0]
    source, scheme = task.source, task.scheme
    method, layout = METHODS[task.method], LAYOUTS[task.layout]
    shares = _Shares(files, plan, parts, rank, size)
    specs = layout.outputs(shares.shape, source.dtype, scheme)
    multiple, block_rows = layout.row_multiple(scheme), method.block_rows
    cuts = [cut(part.source, shares.shape, 0, multiple, plan.execution, block_rows=block_rows) for part in parts]
    tile_rows = min(found.tile_rows for found in cuts)
    dtype, scale_dtype = torch_dtype(source.dtype), torch_dtype(layout.scale_dtype(source.dtype))
    constants = layout.constants(scheme, source.dtype, input_max_of(task, files))
    inputs = _part_of_inputs(inputs_of(task, files), shares.columns)
    blocks: dict[str, list[Tensor]] = {spec.suffix: [] for spec in specs}
    try:
        span = method.span(shares.tiles(tile_rows), scheme, inputs)
        for w_OI in shares.tiles(tile_rows):
            encoded = layout.encode(method.quantize(w_OI, scheme, dtype, scale_dtype, span), scheme, shares.shape)
            for suffix, block in (encoded | constants).items():
                blocks[suffix].append(block)
    except NonFinite:
        raise shares.nonfinite() from None
    except ScaleOverflow:
        raise overflow_error(source, layout.name) from None
    except BadInputs as error:
        raise inputs_error(source, error) from None
    result = {}
    for spec in specs:
        whole = torch.cat(blocks[spec.suffix]) if spec.rows_per_element else blocks[spec.suffix][0]
        result[f"{name}.{spec.suffix}"] = whole.t().contiguous() if spec.transposed else whole
    return result


class _Shares:
    """A rank's shares of several weights, one above the other: a matrix of `shape` [O, I].

    Each has buffers of its own, as some readers hold what they have read.
    """

    def __init__(self, files: Files, plan: Plan, tasks: Sequence[Quantize], rank: int, size: int) -> None:
        config: Mapping[str, Any] = plan.checkpoint.text_config
        self.sources = [task.source for task in tasks]
        found = [part_of(source.module, source.shape, rank, size, config) for source in self.sources]
        self.parts = [part for part in found if part is not None]
        assert len(self.parts) == len(found), "the plan has checked that every layer divides by the ranks"
        self.shape = (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])
        whole = self.parts[0].columns == (0, self.sources[0].shape[1])
        self.columns = None if whole else self.parts[0].columns
        self.rows = [open_rows(s, files, Workspace(), plan.execution.slab_nbytes) for s in self.sources]

    def tiles(self, tile_rows: int) -> Iterator[Tensor]:
        """float32 [tile_rows, I] at a time, from the top; each tile may overwrite the one before."""
        for first, last in spans(0, self.shape[0], tile_rows):
            pieces = list(self._pieces(first, last))
            yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _pieces(self, first: int, last: int) -> Iterator[Tensor]:
        top = 0
        for part, rows in zip(self.parts, self.rows, strict=True):
            begin, end = max(first, top), min(last, top + part.shape[0])
            if begin < end:
                shift = part.rows[0] - top
                yield rows.rows(begin + shift, end + shift, self.columns)
            top += part.shape[0]

    def nonfinite(self) -> CheckpointError:
        """What is wrong with the first weight that holds NaN or Inf."""
        counts = [(source, count_nonfinite(rows, source)) for source, rows in zip(self.sources, self.rows, strict=True)]
        return nonfinite_error(*next((source, found) for source, found in counts if found[2]))
