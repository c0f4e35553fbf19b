"""Products of vectors with stored weights, tile by tile, by several workers. Imports torch.

Tiles do not depend on the number of workers, so that the products do not either.

Legend: N tokens, I columns of a weight, R rows of a tile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from quantconvert.buffers import Workspace
from quantconvert.factors.room import tile_rows
from quantconvert.factors.walk import Linear
from quantconvert.sources import Read, open_rows
from quantconvert.sources.rows import Files, Rows
from quantconvert.spans import spans

# Told a tensor's name and how many more of its bytes are done, 0 too, from any thread; may raise to stop.
Advance = Callable[[str, int], None]
# Takes the first row of a tile and the products, float32 [N, R] for each weight; may overwrite them.
Use = Callable[[int, Sequence[Tensor]], None]


class Tiles:
    """Weights of one source, for as many workers as the pool has; torch runs single-threaded in each."""

    def __init__(
        self, pool: ThreadPoolExecutor, workers: int, files: Files, slab_nbytes: int, advance: Advance
    ) -> None:
        self.pool, self.workers, self.files, self.slab_nbytes, self.advance = pool, workers, files, slab_nbytes, advance
        self._own, self._stop = threading.local(), threading.Event()

    def each(self, linears: Sequence[Linear], x_NI: Tensor, use: Use) -> None:
        """Call `use` for each tile of the weights, which have as many rows and read the same x: from several threads.

        Each worker does neighbouring tiles, so that what is stored transposed is read once by each.
        """
        parts = list(spans(0, linears[0].rows, tile_rows(linears[0])))
        count = min(self.workers, len(parts))
        shares = [parts[len(parts) * i // count : len(parts) * (i + 1) // count] for i in range(count)]
        try:
            for _ in self.pool.map(lambda share: self._share(linears, x_NI, use, share), shares):
                pass
        except BaseException:
            self._stop.set()  # the pool waits for its threads: they end with their tile
            raise

    def _share(self, linears: Sequence[Linear], x_NI: Tensor, use: Use, parts: Sequence[tuple[int, int]]) -> None:
        opened = [
            _Products(linear, self.files, self._workspace(i), self.slab_nbytes) for i, linear in enumerate(linears)
        ]
        for first, last in parts:
            products = []
            if self._stop.is_set():
                raise InterruptedError
            for weight in opened:
                products.append(weight.of(x_NI, first, last))
                linear = weight.linear
                self.advance(linear.weight.name, linear.nbytes * (last - first) // linear.rows)
            use(first, products)

    def _workspace(self, index: int) -> Workspace:
        """Buffers of this thread; weights that are read at once must not share them."""
        spaces: list[Workspace] = self._own.__dict__.setdefault("spaces", [])
        while len(spaces) <= index:
            spaces.append(Workspace())
        return spaces[index]

    def vector(self, read: Read) -> Tensor:
        """The values of a vector, float32."""
        return _vector(read, self.files, self.slab_nbytes)


def _vector(read: Read, files: Files, slab_nbytes: int) -> Tensor:
    return open_rows(read, files, Workspace(), slab_nbytes).rows(0, 1)[0].clone()


class _Products:
    """One weight, opened by one worker."""

    def __init__(self, linear: Linear, files: Files, work: Workspace, slab_nbytes: int) -> None:
        self.linear, self.work = linear, work
        self.rows: Rows = open_rows(linear.weight, files, work, slab_nbytes)
        self.bias = _vector(linear.bias, files, slab_nbytes) if linear.bias else None

    def of(self, x_NI: Tensor, first: int, last: int) -> Tensor:
        """float32 [N, R]: x times these rows of the module; the next call overwrites it."""
        first, last = self.linear.first + first, self.linear.first + last
        w_RI = self.rows.rows(first, last)
        y_NR = self.work.tensor("product", torch.float32, (len(x_NI), last - first))
        torch.mm(x_NI, w_RI.t(), out=y_NR)
        return y_NR if self.bias is None else y_NR.add_(self.bias[first:last])
