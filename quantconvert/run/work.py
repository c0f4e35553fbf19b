"""Carrying out one task: read, quantize, encode, write, slab by slab."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError, OutputError, UnsupportedError
from quantconvert.layouts import get_layout
from quantconvert.machine import copy_range
from quantconvert.methods import rtn
from quantconvert.planning import Execution, Task
from quantconvert.planning.memory import COPY_CHUNK_NBYTES, Cut, cut, read_multiple, spans
from quantconvert.run.blocks import BlockReader, recast
from quantconvert.run.disk import write_all
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.run.readers import Reader, open_reader, read_part, tiles
from quantconvert.run.result import TaskResult
from quantconvert.run.shards import ShardWriter
from quantconvert.sources import Source, Weight

# First row, number of rows, and blocks by suffix, row axis first.
Tile = tuple[int, int, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Bench:
    """What a worker needs to carry out tasks: the source, the writer, its own buffers, and whom to tell of progress.

    advance: called with a tensor's name and how many more of its bytes are done, 0 too; may raise to stop the task.
    """

    files: Files
    writer: ShardWriter
    work: Workspace
    execution: Execution
    format: str
    advance: Callable[[str, int], None]

    def carry_out(self, task: Task) -> TaskResult:
        """Do the whole task; its bytes are in the shard afterwards, not yet durable."""
        work = {"copy": self._copy, "split": self._split, "quantize": self._quantize, "repack": self._repack}
        noise = work.get(task.operation, self._dequantize)(task)
        return TaskResult(self.writer.sums(task, self.work, lambda: self.advance(task.source.name, 0)), noise)

    def _copy(self, task: Task) -> None:
        """Bytes as they are, without passing through this process where the file systems can do it."""
        (output,), ref = task.outputs, task.source
        assert isinstance(ref, TensorRef)
        source, target = self.files.fd(ref.file), self.writer.fd(output.shard)
        for begin, end in spans(0, ref.nbytes, 16 * COPY_CHUNK_NBYTES):
            done = begin
            while done < end:
                count = copy_range(source, target, end - done, ref.offset + done, output.offset + done)
                if count == 0:
                    size = min(end - done, COPY_CHUNK_NBYTES)
                    chunk = bytes_of(self.work.tensor("raw", torch.uint8, (size,)))
                    self.files.read_into(ref.file, chunk, ref.offset + done)
                    try:
                        write_all(target, chunk, output.offset + done)
                    except OSError as error:
                        raise OutputError(f"cannot write tensor `{output.name}`: {error.strerror}") from error
                    count = len(chunk)
                done += count
            self.advance(ref.name, end - begin)

    def _stream(self, task: Task, parts: Cut, make: Callable[[int, int], Iterator[Tile]]) -> None:
        """Write what `make(begin, end)` yields for each slab of rows: straight away, or turned once a slab is full."""
        rows, nbytes = task.source.shape[0], task.source.nbytes
        told = 0
        for begin, end in spans(0, rows, parts.slab_rows):
            slabs = self._slabs(task, end - begin)
            for first, count, blocks in make(begin, end):
                for output in task.outputs:
                    block = blocks[output.suffix]
                    if output.transposed:
                        at = (first - begin) // output.rows_per_element
                        slabs[output.suffix][at : at + block.shape[0]] = block
                    else:
                        self.writer.write_rows(output, block, first)
                done = nbytes * (first + count) // rows
                self.advance(task.source.name, done - told)
                told = done
            for output in task.outputs:
                if output.transposed:
                    self.writer.write_turned(output, slabs[output.suffix], begin, self.work)
        self.work.trim(self.execution.memory_limit // self.execution.workers)

    def _reader(self, task: Task) -> Reader:
        return open_reader(task.source, self.files, self.work, self.execution)

    def _cut(self, task: Task, multiple: int) -> Cut:
        turned = sum(output.nbytes for output in task.outputs if output.transposed)
        return cut(task.source, task.source.shape, turned, multiple, self.execution)

    def _quantize(self, task: Task) -> tuple[float, float]:
        source, scheme, fmt = task.source, task.scheme, get_layout(self.format)
        assert scheme is not None
        reader, shape = self._reader(task), source.shape
        parts = self._cut(task, math.lcm(fmt.row_multiple(scheme), read_multiple(source)))
        dtype, scale_dtype = torch_dtype(source.dtype), torch_dtype(fmt.scale_dtype(source.dtype))

        noise = rtn.Noise(lambda shape: self.work.tensor("rounded", torch.float32, shape))

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, w_OI in tiles(reader, begin, end, parts.tile_rows):
                quantized = rtn.quantize(w_OI, scheme, dtype, scale_dtype, span, noise)
                yield first, w_OI.shape[0], fmt.encode(quantized, scheme, shape)

        try:
            first_pass = tiles(reader, 0, shape[0], parts.tile_rows)
            span = rtn.measure_all(self._heard(source.name, first_pass), scheme)
            self._stream(task, parts, make)
            return noise.noise, noise.signal
        except rtn.NonFinite:
            raise nonfinite_error(source, count_nonfinite(reader, source)) from None
        except rtn.ScaleOverflow:
            raise overflow_error(source, fmt.name) from None

    def _heard(self, name: str, read: Iterator[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """The tiles of a first pass, which tells of no progress but must stop when all workers do."""
        for _, w_OI in read:
            self.advance(name, 0)
            yield w_OI

    def _dequantize(self, task: Task) -> None:
        """A stored weight as plain floats."""
        reader, parts = self._reader(task), self._cut(task, read_multiple(task.source))
        dtype = torch_dtype(task.outputs[0].dtype)

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, w_OI in tiles(reader, begin, end, parts.tile_rows):
                weight = w_OI.to(dtype)
                lost = ~torch.isfinite(weight)
                if bool(lost.any()):
                    finite = torch.isfinite(w_OI)
                    if task.reason is None and not bool(finite.all()):
                        raise nonfinite_error(task.source, count_nonfinite(reader, task.source))
                    if bool((lost & finite).any()):  # else kept: NaN of the source's own, as in a copy
                        raise UnsupportedError(
                            f"`{task.source.name}` has weights that {task.outputs[0].dtype} does not hold",
                            hint="--dtype bfloat16 or float32",
                        )
                yield first, w_OI.shape[0], {"weight": weight}

        self._stream(task, parts, make)

    def _split(self, task: Task) -> None:
        """One expert's share of the biases, as it is."""
        source = task.source
        assert isinstance(source, Weight)
        part = read_part(source, self.files)
        assert part.numel() * part.element_size() == task.outputs[0].nbytes, source.name
        self.writer.write_rows(task.outputs[0], part, 0)
        self.advance(source.name, source.nbytes)

    def _repack(self, task: Task) -> None:
        """Stored codes into another layout."""
        source, scheme = task.source, task.scheme
        assert isinstance(source, Weight)
        assert scheme is not None
        assert source.stored is not None
        stored, target = source.stored, get_layout(self.format)
        reader = BlockReader(get_layout(source.layout or ""), stored, self.files, self.work)
        parts = self._cut(task, max(read_multiple(source), target.row_multiple(scheme)))
        scale_dtype = torch_dtype(target.scale_dtype(reader.scale_tag))

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, last in spans(begin, end, parts.tile_rows):
                quantized = recast(reader.rows(first, last), scale_dtype, stored)
                yield first, last - first, target.encode(quantized, scheme, stored.shape)

        self._stream(task, parts, make)

    def _slabs(self, task: Task, num_rows: int) -> dict[str, Tensor]:
        """Where the blocks of transposed outputs are gathered, by suffix, row axis first."""
        return {
            o.suffix: self.work.tensor(o.suffix, torch_dtype(o.dtype), (-(-num_rows // o.rows_per_element), o.shape[0]))
            for o in task.outputs
            if o.transposed
        }


def count_nonfinite(reader: Reader, source: Source) -> tuple[int, int, tuple[int, ...]]:
    """How many NaN and Inf a weight holds, and the index of the first of them."""
    nan = inf = 0
    first: tuple[int, ...] = ()
    rows = max(64, (1 << 18) // max(1, source.shape[1]) // 64 * 64)
    for begin, w_OI in tiles(reader, 0, source.shape[0], rows):
        bad = ~torch.isfinite(w_OI)
        if bool(bad.any()):
            if not first:
                row, column = bad.nonzero()[0].tolist()
                first = (begin + row, column)
            nan += int(w_OI.isnan().sum())
            inf += int(w_OI.isinf().sum())
    return nan, inf, first


def nonfinite_text(found: tuple[int, int, tuple[int, ...]]) -> str:
    """`3 NaN, 1 Inf, first at [0, 17]`."""
    nan, inf, first = found
    counts = ", ".join(f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "Inf")) if count)
    return f"{counts}, first at {list(first)}"


def nonfinite_error(ref: Source, found: tuple[int, int, tuple[int, ...]]) -> CheckpointError:
    return CheckpointError(
        f"tensor `{ref.name}` in `{ref.file}` holds {nonfinite_text(found)}: expected finite weights",
        hint="--nan-policy keep leaves such tensors (and what is fused with them) unquantized",
    )


def overflow_error(ref: Source, fmt: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor `{ref.name}` in `{ref.file}` has a scale above 65504, the largest of float16, which {fmt} stores",
        hint="--format compressed-tensors stores scales in the weight's own dtype, or --ignore this tensor",
    )
