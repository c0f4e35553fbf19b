"""Tasks in torch, tile by tile: decode, quantize, encode, write. The reference, and what no kernel does whole.

Imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import UnsupportedError
from quantconvert.kernels import Fast, find_kernel
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS, BadInputs, Noise, NonFinite, ScaleOverflow
from quantconvert.planning import Decode, Execution, Output, Quantize, Repack
from quantconvert.run.complaints import Nonfinite, inputs_error, nonfinite_error, overflow_error
from quantconvert.run.knowing import input_max_of, inputs_of
from quantconvert.run.pieces import PIECE_NBYTES
from quantconvert.run.result import Done
from quantconvert.run.shards import ShardWriter
from quantconvert.sources import Read, open_rows
from quantconvert.sources.blocks import BlockReader, recast
from quantconvert.sources.rows import Rows, tiles
from quantconvert.spans import spans

# First row, number of rows, and blocks by suffix, row axis first.
Tile = tuple[int, int, dict[str, Tensor]]


class Tiled:
    """One worker's. advance: called with a tensor's name and how many more of its bytes are done, 0 too; may raise to
    stop the task. folder: on the disk that scratch files shall take room of.
    """

    def __init__(
        self,
        files: Files,
        writer: ShardWriter,
        execution: Execution,
        advance: Callable[[str, int], None],
        folder: Path | None = None,
    ) -> None:
        self.files, self.writer, self.execution, self.advance = files, writer, execution, advance
        self.work = Workspace(folder)

    def carry_out(self, task: Quantize | Repack | Decode) -> Done:
        """The whole task."""
        match task:
            case Quantize():
                return self._quantize(task)
            case Repack():
                return self._repack(task)
            case Decode():
                return self.decode(task, 0, task.source.matrix[0])

    def _stream(
        self, task: Quantize | Repack | Decode, make: Callable[[int, int], Iterator[Tile]], begin: int, end: int
    ) -> dict[str, int]:
        """Write what `make(begin, end)` yields for each slab of rows begin..end: straight away, or turned once a slab
        is full. Returns the sums of pieces by suffix.
        """
        rows, nbytes = task.source.matrix[0], task.source.nbytes
        reported, sums = nbytes * begin // rows, Counter[str]()
        for top, bottom in spans(begin, end, task.cut.slab_rows):
            slabs = self._slabs(task, bottom - top)
            for first, count, blocks in make(top, bottom):
                for output in task.outputs:
                    spec, block = output.spec, blocks[output.spec.suffix]
                    assert block.dtype == torch_dtype(spec.dtype), f"{output.name}: {block.dtype} is not {spec.dtype}"
                    if spec.transposed:
                        at = (first - top) // spec.rows_per_element
                        slabs[spec.suffix][at : at + block.shape[0]] = block
                    else:
                        sums[spec.suffix] += self._write(output, block, first)
                done = nbytes * (first + count) // rows
                self.advance(task.source.name, done - reported)
                reported = done
            for output in task.outputs:
                if output.spec.transposed:
                    sums[output.spec.suffix] += self._write_turned(output, slabs[output.spec.suffix], top)
        self.work.trim(self.execution.memory_limit // self.execution.workers)
        return sums

    def _write(self, output: Output, block: Tensor, first: int) -> int:
        """Write a block, row axis first, that rows from `first` on make of `output`; one that does not depend on rows
        with the first rows only.
        """
        shared = output.spec.rows_per_element
        if not shared and first:
            return 0
        begin = output.offset_of_row(first // shared) if shared else 0
        return self.writer.write_piece(output, bytes_of(block.contiguous()), begin)

    def _write_turned(self, output: Output, block: Tensor, first: int) -> int:
        """Write a block, row axis first, of an `output` that is stored transposed: a part of each of its rows. The sum
        of its pieces where it is all of the tensor, else 0.
        """
        turned = self.work.tensor("turned", block.dtype, (block.shape[1], block.shape[0]))
        turned.copy_(block.t())
        data, total = bytes_of(turned), output.spec.shape[-1]
        part, stride = block.shape[0] * block.element_size(), total * block.element_size()
        if part == stride:
            return sum(
                self.writer.write_piece(output, data[begin:end], begin)
                for begin, end in spans(0, len(data), PIECE_NBYTES)
            )
        left = first // output.spec.rows_per_element * block.element_size()
        for row in range(block.shape[1]):
            self.writer.write(output, data[row * part : (row + 1) * part], row * stride + left)
        return 0

    def _rows(self, read: Read) -> Rows:
        return open_rows(read, self.files, self.work, self.execution.slab_nbytes)

    def _quantize(self, task: Quantize) -> Done:
        source, scheme = task.source, task.scheme
        beside = [tile for read in task.siblings for tile in self._largest_tiles(read, task.cut.tile_rows)]
        rows, count, tile_rows = self._rows(source), source.matrix[0], task.cut.tile_rows
        method, layout = METHODS[task.method], LAYOUTS[task.layout]
        noise = Noise(lambda shape: self.work.tensor("rounded", torch.float32, shape))
        noises, signals = list[float](), list[float]()
        try:
            heard = chain(beside, self._heard(source.name, tiles(rows, 0, count, tile_rows)))
            span = method.span(heard, scheme, inputs_of(task, self.files))
            constants = layout.constants(scheme, source.dtype, input_max_of(task, self.files))
            fast = find_kernel(source, method, scheme, layout, self.files)
            if fast is None:
                encode = _reference(task, rows, span, noise)
            else:
                unchanged = fast.stored and source.steps
                encode = _by_kernel(fast, self._rows(replace(source, steps=())) if unchanged else rows, span, noise)

            def make(begin: int, end: int) -> Iterator[Tile]:
                for first, last in spans(begin, end, tile_rows):
                    noise.noise = noise.signal = 0.0
                    yield first, last - first, encode(first, last) | constants
                    noises.append(noise.noise)
                    signals.append(noise.signal)

            return Done(self._stream(task, make, 0, count), noises, signals)
        except NonFinite:
            raise nonfinite_error(source, self.nonfinite(source)) from None
        except ScaleOverflow:
            raise overflow_error(source, task.layout) from None
        except BadInputs as error:
            raise inputs_error(source, error) from None

    def _largest_tiles(self, read: Read, tile_rows: int) -> Iterator[Tensor]:
        """Of each tile of another weight, its largest values alone: a row of them, as a method's `span` takes them."""
        for w_OI in self._heard(read.name, tiles(self._rows(read), 0, read.matrix[0], tile_rows)):
            largest = w_OI.abs().amax(0, keepdim=True)
            if not bool(torch.isfinite(largest).all()):
                raise nonfinite_error(read, self.nonfinite(read))
            yield largest

    def nonfinite(self, source: Read) -> Nonfinite:
        """What of a weight is not finite: as it is stored, before a step spread it, if it is not the step's own."""
        stored = count_nonfinite(self._rows(replace(source, steps=())), source)
        return stored if any(stored[:2]) else count_nonfinite(self._rows(source), source)

    def _heard(self, name: str, read: Iterator[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """The tiles of a first pass, which tells of no progress but must stop when all workers do."""
        for _, w_OI in read:
            self.advance(name, 0)
            yield w_OI

    def decode(self, task: Decode, begin: int, end: int) -> Done:
        """Rows begin..end of a stored weight as plain floats."""
        rows, (output,) = self._rows(task.source), task.outputs
        dtype = torch_dtype(output.spec.dtype)

        def make(top: int, bottom: int) -> Iterator[Tile]:
            for first, w_OI in tiles(rows, top, bottom, task.cut.tile_rows):
                yield first, w_OI.shape[0], {output.spec.suffix: plain(task, w_OI, dtype, rows)}

        return Done(self._stream(task, make, begin, end))

    def _repack(self, task: Repack) -> Done:
        """Stored codes into another layout."""
        stored, target = task.source.stored, LAYOUTS[task.layout]
        assert stored is not None
        reader = BlockReader(stored, self.files, self.work)
        scale_dtype = torch_dtype(target.scale_dtype(reader.scale_tag))
        constants = reader.constants()

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, last in spans(begin, end, task.cut.tile_rows):
                quantized = recast(reader.quantized(first, last), scale_dtype, stored)
                yield first, last - first, target.encode(quantized, task.scheme, stored.shape) | constants

        return Done(self._stream(task, make, 0, task.source.matrix[0]))

    def _slabs(self, task: Quantize | Repack | Decode, num_rows: int) -> dict[str, Tensor]:
        """Where the blocks of transposed outputs are gathered, by suffix, row axis first."""
        specs = [output.spec for output in task.outputs if output.spec.transposed]
        return {
            spec.suffix: self.work.tensor(
                spec.suffix, torch_dtype(spec.dtype), (-(-num_rows // spec.rows_per_element), spec.shape[0])
            )
            for spec in specs
        }


# From a range of rows to blocks by suffix.
Encoder = Callable[[int, int], dict[str, Tensor]]


def _reference(task: Quantize, rows: Rows, span: Any, noise: Noise) -> Encoder:
    """Decode, quantize, encode: what every kernel does in one call, to the bit."""
    source, scheme = task.source, task.scheme
    method, layout = METHODS[task.method], LAYOUTS[task.layout]
    dtype, scale_dtype = torch_dtype(source.dtype), torch_dtype(layout.scale_dtype(source.dtype))

    def encode(first: int, last: int) -> dict[str, Tensor]:
        quantized = method.quantize(rows.rows(first, last), scheme, dtype, scale_dtype, span, noise)
        return layout.encode(quantized, scheme, source.shape)

    return encode


def _by_kernel(fast: Fast, rows: Rows, span: Any, noise: Noise) -> Encoder:
    def encode(first: int, last: int) -> dict[str, Tensor]:
        tile = rows.raw(first, last) if fast.stored else {"weight": rows.rows(first, last)}
        return fast.encode(tile, first, span, noise)

    return encode


def plain(task: Decode, w_OI: Tensor, dtype: torch.dtype, rows: Rows) -> Tensor:
    """A tile of plain numbers in the dtype of the result; raises for what that does not hold."""
    weight = w_OI.to(dtype)
    lost = ~torch.isfinite(weight)
    if bool(lost.any()):
        finite = torch.isfinite(w_OI)
        if task.reason is None and not bool(finite.all()):
            raise nonfinite_error(task.source, count_nonfinite(rows, task.source))
        if bool((lost & finite).any()):  # else kept: NaN of the source's own, as in a copy
            raise UnsupportedError(
                f"`{task.source.name}` has weights that {task.outputs[0].spec.dtype} does not hold",
                hint="--dtype bfloat16 or float32" if task.reason is None else None,
            )
    return weight


def count_nonfinite(reader: Rows, source: Read) -> Nonfinite:
    """How many NaN and Inf a weight holds, and the index of the first of them."""
    nan = inf = 0
    first: tuple[int, ...] = ()
    count, width = source.matrix
    rows = max(64, (1 << 18) // max(1, width) // 64 * 64)
    for begin, w_OI in tiles(reader, 0, count, rows):
        bad = ~torch.isfinite(w_OI)
        if bool(bad.any()):
            if not first:
                row, column = bad.nonzero()[0].tolist()
                first = (begin + row, column)
            nan += int(w_OI.isnan().sum())
            inf += int(w_OI.isinf().sum())
    return nan, inf, first
