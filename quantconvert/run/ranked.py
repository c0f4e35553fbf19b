"""One tensor-parallel rank's share of a conversion, in memory, for engines that quantize while they load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantconvert.checkpoint import Repo
from quantconvert.families.parallel import part_of
from quantconvert.layouts import Layout, get_layout
from quantconvert.methods import rtn
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.planning import Plan, Task
from quantconvert.planning.memory import cut, read_multiple
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.run.readers import open_reader, read_part, tiles
from quantconvert.run.work import count_nonfinite, nonfinite_error, overflow_error
from quantconvert.sources import Weight


def iter_rank(plan: Plan, repo: Repo, rank: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of rank `rank` of `size`: quantized weights sharded first, everything else whole."""
    files, work, fmt = Files(repo), Workspace(), get_layout(plan.format)
    try:
        for task in plan.tasks:
            if task.reason is not None:
                yield task.source.name, _whole(files, work, task, plan)
            else:
                yield from _quantized(files, work, fmt, plan, task, rank, size).items()
    finally:
        files.close()


def _whole(files: Files, work: Workspace, task: Task, plan: Plan) -> Tensor:
    source = task.source
    if isinstance(source, Weight):
        if task.operation == "split":
            return read_part(source, files)
        reader = open_reader(source, files, work, plan.execution)
        whole = torch.empty(source.shape, dtype=torch_dtype(source.dtype))
        for first, w_OI in tiles(reader, 0, source.shape[0], 1024):
            whole[first : first + w_OI.shape[0]] = w_OI
        return whole
    tensor = torch.empty(source.shape, dtype=torch_dtype(source.dtype))
    if tensor.numel():
        files.read_into(source.file, bytes_of(tensor), source.offset)
    return tensor


def _quantized(
    files: Files, work: Workspace, fmt: Layout, plan: Plan, task: Task, rank: int, size: int
) -> dict[str, Tensor]:
    ref, scheme = task.source, task.scheme
    config: Mapping[str, Any] = plan.checkpoint.text_config
    module = ref.name.removesuffix(WEIGHT_SUFFIX)
    part = part_of(module, ref.shape, rank, size, config)
    assert scheme is not None
    assert part is not None, "the plan has checked that every layer divides by the ranks"
    specs = fmt.outputs(part.shape, ref.dtype, scheme)
    multiple = fmt.row_multiple(scheme)
    parts = cut(ref, part.shape, 0, math.lcm(multiple, read_multiple(ref)), plan.execution)
    reader = open_reader(ref, files, work, plan.execution)
    columns = None if part.columns == (0, ref.shape[1]) else part.columns
    dtype, scale_dtype = torch_dtype(ref.dtype), torch_dtype(fmt.scale_dtype(ref.dtype))

    def read() -> Iterator[Tensor]:
        for _, w_OI in tiles(reader, *part.rows, parts.tile_rows, columns):
            yield w_OI

    blocks: dict[str, list[Tensor]] = {spec.suffix: [] for spec in specs}
    try:
        span = rtn.measure_all(read(), scheme)
        for w_OI in read():
            encoded = fmt.encode(rtn.quantize(w_OI, scheme, dtype, scale_dtype, span), scheme, part.shape)
            for suffix, block in encoded.items():
                blocks[suffix].append(block)
    except rtn.NonFinite:
        raise nonfinite_error(ref, count_nonfinite(reader, ref)) from None
    except rtn.ScaleOverflow:
        raise overflow_error(ref, fmt.name) from None
    result = {}
    for spec in specs:
        whole = torch.cat(blocks[spec.suffix]) if spec.rows_per_element else blocks[spec.suffix][0]
        result[f"{module}.{spec.suffix}"] = whole.t().contiguous() if spec.transposed else whole
    return result
