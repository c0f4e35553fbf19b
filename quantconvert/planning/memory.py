"""What a task costs in memory, and how rows are cut so that it stays within the budget. Pure arithmetic.

A weight is processed tile by tile, sized to stay in a core's cache. What a layout stores transposed is gathered over
several tiles, a slab, before it is turned and written. Both are whole rows, aligned to what the format packs together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from quantconvert.dtypes import DTYPES
from quantconvert.errors import UnsupportedError
from quantconvert.job import Limits
from quantconvert.layouts import get_layout
from quantconvert.machine import cpu_count
from quantconvert.planning.plan import Execution, Task
from quantconvert.sources import Source, Weight, specs_of

TILE_ELEMENTS = 1 << 18
# Bytes a tile element needs beside its raw bytes: float32, rounded and uint8 copies, packed words, torch's scratch.
TILE_BYTES_PER_ELEMENT = 22
MAX_SLAB_NBYTES = 32_000_000
COPY_CHUNK_NBYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Cut:
    """How one weight is cut: rows of a tile and of a slab, and the bytes that this needs at its peak."""

    tile_rows: int
    slab_rows: int
    peak_nbytes: int


def execution_for(limits: Limits) -> Execution:
    """Workers (one a core unless told) and the slab size that their number and the memory limit allow."""
    workers = limits.workers or cpu_count()
    slab = max(1, min(MAX_SLAB_NBYTES, limits.memory_limit // (4 * workers)))
    return Execution(workers, slab, limits.memory_limit)


def cut(source: Source, shape: tuple[int, ...], turned_nbytes: int, multiple: int, execution: Execution) -> Cut:
    """Cut `source`, or a part of it of `shape` [O, I], into tiles, and turned output into slabs that there is room for.

    turned_nbytes: bytes of all outputs that are stored transposed; they are gathered slab by slab and held twice while
    they are turned. Other outputs are written tile by tile. One `multiple` of rows is the least there can be, so the
    peak may exceed what there is room for; the plan refuses when it exceeds the whole budget.
    """
    costs = _costs(source, execution)
    return _cut(shape, costs, turned_nbytes, multiple, execution, TILE_ELEMENTS, TILE_BYTES_PER_ELEMENT)


@dataclass(frozen=True, slots=True)
class _Costs:
    """What reading takes beside tiles of float32: raw bytes an element, bytes held throughout, and bytes for each row
    of a slab of `slab_rows` (or of a tile, if that is more) where the source is stored transposed.
    """

    raw: int
    held: int = 0
    row_nbytes: int = 0
    slab_rows: int = 0


def _costs(source: Source, execution: Execution) -> _Costs:
    if not isinstance(source, Weight):
        return _Costs(DTYPES[source.dtype].bits // 8)
    if source.stored is not None:  # what is stored transposed is read whole
        specs = specs_of(get_layout(source.layout or ""), source.stored)
        return _Costs(source.bytes_per_element, sum(spec.nbytes for spec in specs.values() if spec.transposed))
    if not source.view.transposed:
        return _Costs(source.bytes_per_element, source.held_nbytes)
    rows = turned_rows(source, execution)
    return _Costs(source.bytes_per_element, source.held_nbytes, source.row_nbytes, rows)


@lru_cache(maxsize=4096)  # the experts of a model are cut alike
def _cut(
    shape: tuple[int, ...],
    costs: _Costs,
    turned_nbytes: int,
    multiple: int,
    execution: Execution,
    tile_elements: int,
    tile_bytes: int,
) -> Cut:
    rows, columns = shape
    tile_rows = _aligned(tile_elements // max(1, columns), multiple, rows)
    held = costs.held + max(tile_rows, costs.slab_rows) * costs.row_nbytes
    tile = tile_rows * columns * (tile_bytes + costs.raw) + held
    if not turned_nbytes:
        return Cut(tile_rows, rows, tile)
    per_row = turned_nbytes / rows
    slab = min(execution.slab_nbytes, (execution.memory_limit - tile) // 2)
    slab_rows = max(_aligned(int(slab / per_row), multiple, rows), tile_rows)
    if slab_rows < rows:
        slab_rows = slab_rows // tile_rows * tile_rows
    return Cut(tile_rows, slab_rows, tile + 2 * int(slab_rows * per_row))


def read_multiple(source: Source) -> int:
    """Blocks of rows of `source` can be read from multiples of this on: codes of several rows share a word."""
    if isinstance(source, Weight) and source.stored is not None:
        return get_layout(source.layout or "").row_multiple(source.stored.scheme)
    return 1


def turned_rows(weight: Weight, execution: Execution) -> int:
    """Rows of a weight that is stored transposed which its reader takes in at once."""
    return max(1, min(weight.shape[0], execution.slab_nbytes // max(1, weight.row_nbytes)))


def check_memory(tasks: Sequence[Task], execution: Execution) -> None:
    """Refuse a plan of which one task alone exceeds the budget."""
    worst = max(tasks, key=lambda task: task.peak_nbytes)
    if worst.peak_nbytes > execution.memory_limit:
        raise UnsupportedError(
            f"tensor `{worst.source.name}` in `{worst.source.file}` needs {worst.peak_nbytes} bytes at its peak: "
            f"expected at most --memory-limit {execution.memory_limit}",
            hint=f"--memory-limit {-(-worst.peak_nbytes // 10**6)}MB",
        )


def _aligned(wanted: int, multiple: int, rows: int) -> int:
    """The largest multiple of `multiple` up to `wanted`, at least one multiple, at most all rows."""
    return max(1, min(rows, max(multiple, wanted // multiple * multiple)))


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most `step` that cover start..stop."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
