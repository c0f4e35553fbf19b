"""What a task costs in memory, and how rows are cut so that it stays within the budget. Pure arithmetic.

A weight is processed tile by tile, sized to stay in a core's cache. A slab is several tiles, about 16 MB, which one
worker carries out at once: workers share a large weight. What a layout stores transposed is gathered over a slab before
it is turned and written. Both are whole rows, aligned to what the format packs together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from quantconvert.errors import UnsupportedError
from quantconvert.job import Limits
from quantconvert.kernels import most_workers
from quantconvert.machine import cpu_count
from quantconvert.planning.plan import Execution
from quantconvert.planning.tasks import Cut, Task
from quantconvert.sources import Cost, Read, cost_of

TILE_ELEMENTS = 1 << 18
# Bytes a tile element needs beside its raw bytes: float32, packed words, torch's scratch; and what decoding takes.
TILE_BYTES, DECODE_SCRATCH = 13, 9
MAX_SLAB_NBYTES = 32_000_000
# Elements of a slab, and of one of a matrix that is stored transposed, which is read as a strip.
SLAB_ELEMENTS, STRIP_ELEMENTS = 1 << 23, 1 << 22
# What a slab is gathered in: enough for 8192 x 2048 int4 with its scales, which are then written in one piece.
MAX_TURNED_NBYTES = 9_000_000


def execution_for(limits: Limits) -> Execution:
    """Workers (unless told one a core, as many as pay) and the slab size that their number and the limit allow."""
    workers = limits.workers or min(cpu_count(), most_workers())
    slab = max(1, min(MAX_SLAB_NBYTES, limits.memory_limit // (4 * workers)))
    return Execution(workers, slab, limits.memory_limit)


def cut(
    source: Read,
    shape: tuple[int, int],
    turned_nbytes: int,
    multiple: int,
    execution: Execution,
    scratch: int = DECODE_SCRATCH,
    held: int = 0,
    block_rows: int = 0,
) -> Cut:
    """Cut `source`, or a part of it of `shape` [O, I], into tiles, and turned output into slabs that there is room for.

    turned_nbytes: bytes of all outputs that are stored transposed; they are gathered slab by slab and held twice while
    they are turned. Other outputs are written tile by tile. scratch: bytes an element of a tile beside its values.
    held: bytes that a method holds all the while. block_rows: rows that a tile should have where half of a worker's
    memory holds them. One `multiple` of rows (that of the source's encoding apart) is the least there can be, so the
    peak may exceed what there is room for; the plan refuses if it exceeds the whole budget.
    """
    cost = cost_of(source, execution.slab_nbytes)
    held += cost.held
    multiple = math.lcm(multiple, cost.row_multiple)
    room = execution.memory_limit // (2 * execution.workers * (TILE_BYTES + scratch + cost.raw))
    elements = max(TILE_ELEMENTS, min(block_rows * shape[1], room))
    return _cut(shape, cost, turned_nbytes, multiple, execution, scratch, held, elements)


@lru_cache(maxsize=4096)  # the experts of a model are cut alike
def _cut(
    shape: tuple[int, int],
    cost: Cost,
    turned_nbytes: int,
    multiple: int,
    execution: Execution,
    scratch: int,
    held: int,
    tile_elements: int,
) -> Cut:
    rows, columns = shape
    tile_rows = _aligned(tile_elements // max(1, columns), multiple, rows)
    held += max(tile_rows, cost.slab_rows) * cost.row_nbytes
    tile = tile_rows * columns * (TILE_BYTES + scratch + cost.raw) + held
    most = rows
    if cost.slab_rows:
        most = min(cost.slab_rows, STRIP_ELEMENTS // max(1, columns))
    if not turned_nbytes:
        return Cut(tile_rows, _tiles(min(most, SLAB_ELEMENTS // max(1, columns)), tile_rows, rows), tile)
    per_row = turned_nbytes / rows
    slab = min(execution.slab_nbytes, MAX_TURNED_NBYTES, (execution.memory_limit - tile) // 2)
    slab_rows = _tiles(min(most, _aligned(int(slab / per_row), multiple, rows)), tile_rows, rows)
    return Cut(tile_rows, slab_rows, tile + 2 * int(slab_rows * per_row))


def check_memory(tasks: Sequence[Task], execution: Execution) -> None:
    """Refuse a plan of which one task alone exceeds the budget."""
    worst = max(tasks, key=lambda task: task.peak_nbytes)
    if worst.peak_nbytes > execution.memory_limit:
        raise UnsupportedError(
            f"tensor `{worst.source.name}` in `{worst.source.file}` needs {worst.peak_nbytes} bytes at its peak: "
            f"expected at most --memory-limit {execution.memory_limit}",
            hint=f"--memory-limit {-(-worst.peak_nbytes // 10**6)}MB",
        )


def _tiles(wanted: int, tile_rows: int, rows: int) -> int:
    """The largest number of whole tiles up to `wanted` rows, at least one; all rows where that many are wanted."""
    return rows if wanted >= rows else max(1, wanted // tile_rows) * tile_rows


def _aligned(wanted: int, multiple: int, rows: int) -> int:
    """The largest multiple of `multiple` up to `wanted`, at least one multiple, at most all rows."""
    return max(1, min(rows, max(multiple, wanted // multiple * multiple)))
