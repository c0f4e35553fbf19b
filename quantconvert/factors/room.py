"""What a bag of tokens takes in memory: pure arithmetic, known while planning."""

from __future__ import annotations

from typing import Protocol

from quantconvert.factors.walk import Linear, Routed, Walk
from quantconvert.sources import cost_of

# Tokens that are pushed through the layers.
TOKENS = 512
# Vectors are squared so many columns at a time.
SQUARE_COLUMNS = 64
# What torch's matrix product takes of its own in each worker (measured: 7 MB).
PRODUCT_NBYTES = 8_000_000
# A tile of a weight has as many elements, but rows enough that vectors are not read for a few rows each.
TILE_ELEMENTS, TILE_ROWS = 1 << 20, 32


class Execution(Protocol):
    """How much may be used. slab_nbytes: for reading what is stored transposed."""

    @property
    def workers(self) -> int: ...
    @property
    def slab_nbytes(self) -> int: ...
    @property
    def memory_limit(self) -> int: ...


def tile_nbytes(linear: Linear, tokens: int, slab_nbytes: int) -> int:
    """Bytes that a worker holds for one weight: a tile, its raw form, the products, and as much to work on these."""
    cost = cost_of(linear.weight, slab_nbytes)
    rows = tile_rows(linear)
    tile = rows * linear.columns * (4 + cost.raw) + cost.held + max(rows, cost.slab_rows) * cost.row_nbytes
    return tile + 3 * 4 * tokens * rows + 4 * linear.weight.shape[0]


def tile_rows(linear: Linear) -> int:
    """Rows of a tile: a multiple of `TILE_ROWS`, and so of those that share a word, or all."""
    wanted = TILE_ELEMENTS // max(1, linear.columns) // TILE_ROWS * TILE_ROWS
    return min(max(TILE_ROWS, wanted), linear.rows)


def bag_nbytes(walk: Walk, execution: Execution) -> int:
    """Bytes that `bag` takes at its peak, its result included; above the memory limit where one worker has no room."""
    return _held_nbytes(walk) + bag_workers(walk, execution) * _worker_nbytes(walk, execution)


def bag_workers(walk: Walk, execution: Execution) -> int:
    room = (execution.memory_limit - _held_nbytes(walk)) // _worker_nbytes(walk, execution)
    return max(1, min(execution.workers, room))


def _held_nbytes(walk: Walk) -> int:
    """What the vectors of all tokens take whatever the number of workers, and the result."""
    inner = max(columns for layer in walk.layers for _, columns in layer.inputs)
    experts = max((layer.mlp.router.rows for layer in walk.layers if isinstance(layer.mlp, Routed)), default=0)
    streams = 3 + bool(experts)
    floats = streams * walk.width + walk.heads.kv_width + inner + 4 * (experts + SQUARE_COLUMNS + walk.heads.head_dim)
    mixture = 8 * 4 * 4 * walk.heads.repeat * walk.heads.shared
    result = sum(4 * columns for layer in walk.layers for _, columns in layer.inputs)
    return TOKENS * (4 * floats + mixture) + result


def _worker_nbytes(walk: Walk, execution: Execution) -> int:
    """What one worker holds: two weights of the widest layer."""
    linears = [linear for layer in walk.layers for linear in layer.linears]
    return PRODUCT_NBYTES + 2 * max(tile_nbytes(linear, TOKENS, execution.slab_nbytes) for linear in linears)
