"""One tensor-parallel rank's share of a conversion, in memory, for engines that quantize while they load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.families.parallel import part_of
from quantconvert.formats import Format, get_format
from quantconvert.methods import rtn
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.planning import Plan, Task
from quantconvert.planning.memory import cut
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.run.tasks import count_nonfinite, nonfinite_error, overflow_error, tiles


def iter_rank(plan: Plan, root: Path, rank: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of rank `rank` of `size`: quantized weights sharded first, everything else whole."""
    files, work, fmt = Files(root), Workspace(), get_format(plan.format)
    try:
        for task in plan.tasks:
            if task.operation == "copy":
                yield task.source.name, _whole(files, task)
            else:
                yield from _quantized(files, work, fmt, plan, task, rank, size).items()
    finally:
        files.close()


def _whole(files: Files, task: Task) -> Tensor:
    ref = task.source
    tensor = torch.empty(ref.shape, dtype=torch_dtype(ref.dtype))
    if tensor.numel():
        files.read_into(ref.file, bytes_of(tensor), ref.offset)
    return tensor


def _quantized(
    files: Files, work: Workspace, fmt: Format, plan: Plan, task: Task, rank: int, size: int
) -> dict[str, Tensor]:
    ref, scheme = task.source, task.scheme
    config: Mapping[str, Any] = plan.checkpoint.text_config
    module = ref.name.removesuffix(WEIGHT_SUFFIX)
    part = part_of(module, ref.shape, rank, size, config)
    assert scheme is not None
    assert part is not None, "the plan has checked that every layer divides by the ranks"
    specs = fmt.outputs(part.shape, ref.dtype, scheme)
    multiple = fmt.row_multiple(scheme)
    parts = cut(part.shape, ref.dtype, 0, multiple, plan.execution)
    dtype, scale_dtype = torch_dtype(ref.dtype), torch_dtype(fmt.scale_dtype(ref.dtype))

    def read() -> Iterator[Tensor]:
        for _, w_OI in tiles(files, work, ref, *part.rows, parts.tile_rows, part.columns):
            yield w_OI

    blocks: dict[str, list[Tensor]] = {spec.suffix: [] for spec in specs}
    try:
        span = rtn.measure_all(read(), scheme)
        for w_OI in read():
            encoded = fmt.encode(rtn.quantize(w_OI, scheme, dtype, scale_dtype, span), scheme, part.shape)
            for suffix, block in encoded.items():
                blocks[suffix].append(block)
    except rtn.NonFinite:
        raise nonfinite_error(ref, count_nonfinite(files, ref, work)) from None
    except rtn.ScaleOverflow:
        raise overflow_error(ref, fmt.name) from None
    result = {}
    for spec in specs:
        whole = torch.cat(blocks[spec.suffix]) if spec.rows_per_element else blocks[spec.suffix][0]
        result[f"{module}.{spec.suffix}"] = whole.t().contiguous() if spec.transposed else whole
    return result
