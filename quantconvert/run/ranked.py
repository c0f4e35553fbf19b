"""One tensor-parallel rank's share of a conversion, in memory, for engines that quantize while they load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.events import silent
from quantconvert.factors import beside
from quantconvert.families.parallel import part_of
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS, BadInputs, Inputs, NonFinite, ScaleOverflow
from quantconvert.planning import Copy, Decode, Plan, Quantize, Split, Task
from quantconvert.planning.memory import cut
from quantconvert.run.first import first_pass
from quantconvert.run.knowing import input_max_of, inputs_of
from quantconvert.run.work import count_nonfinite, inputs_error, nonfinite_error, overflow_error, plain
from quantconvert.sources import open_rows
from quantconvert.sources.rows import read_vector, tiles


def iter_rank(plan: Plan, repo: Repo, rank: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of rank `rank` of `size`: quantized weights sharded first, everything else whole."""
    with TemporaryDirectory() as folder:
        first_pass(plan, repo, Path(folder), False, silent)
        statistics = plan.statistics.path if plan.statistics else None
        yield from _tensors(plan, Files(repo, beside(Path(folder), statistics)), rank, size)


def _tensors(plan: Plan, files: Files, rank: int, size: int) -> Iterator[tuple[str, Tensor]]:
    work = Workspace()
    try:
        for task in plan.tasks:
            if isinstance(task, Quantize):
                yield from _quantized(files, work, plan, task, rank, size).items()
            else:
                yield task.source.name, _whole(files, work, task, plan)
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


def _quantized(files: Files, work: Workspace, plan: Plan, task: Quantize, rank: int, size: int) -> dict[str, Tensor]:
    source, scheme = task.source, task.scheme
    method, layout = METHODS[task.method], LAYOUTS[task.layout]
    config: Mapping[str, Any] = plan.checkpoint.text_config
    part = part_of(source.module, source.shape, rank, size, config)
    assert part is not None, "the plan has checked that every layer divides by the ranks"
    specs = layout.outputs(part.shape, source.dtype, scheme)
    multiple, block_rows = layout.row_multiple(scheme), method.block_rows
    tile_rows = cut(source, part.shape, 0, multiple, plan.execution, block_rows=block_rows).tile_rows
    rows = open_rows(source, files, work, plan.execution.slab_nbytes)
    columns = None if part.columns == (0, source.shape[1]) else part.columns
    dtype, scale_dtype = torch_dtype(source.dtype), torch_dtype(layout.scale_dtype(source.dtype))

    def read() -> Iterator[Tensor]:
        for _, w_OI in tiles(rows, *part.rows, tile_rows, columns):
            yield w_OI

    constants = layout.constants(scheme, source.dtype, input_max_of(task, files))
    inputs = _part_of_inputs(inputs_of(task, files), columns)
    blocks: dict[str, list[Tensor]] = {spec.suffix: [] for spec in specs}
    try:
        span = method.span(read(), scheme, inputs)
        for w_OI in read():
            encoded = layout.encode(method.quantize(w_OI, scheme, dtype, scale_dtype, span), scheme, part.shape)
            for suffix, block in (encoded | constants).items():
                blocks[suffix].append(block)
    except NonFinite:
        raise nonfinite_error(source, count_nonfinite(rows, source)) from None
    except ScaleOverflow:
        raise overflow_error(source, layout.name) from None
    except BadInputs as error:
        raise inputs_error(source, error) from None
    result = {}
    for spec in specs:
        whole = torch.cat(blocks[spec.suffix]) if spec.rows_per_element else blocks[spec.suffix][0]
        result[f"{source.module}.{spec.suffix}"] = whole.t().contiguous() if spec.transposed else whole
    return result
