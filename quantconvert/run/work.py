"""Carrying out one task: read, quantize, encode, write, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, OutputError, UnsupportedError
from quantconvert.kernels import find_kernel
from quantconvert.layouts import LAYOUTS
from quantconvert.machine import copy_range
from quantconvert.methods import METHODS, BadInputs, Noise, NonFinite, ScaleOverflow
from quantconvert.planning import Copy, Decode, Execution, Quantize, Repack, Split, Task
from quantconvert.planning.tasks import COPY_CHUNK_NBYTES
from quantconvert.run.disk import write_all
from quantconvert.run.knowing import input_max_of, inputs_of
from quantconvert.run.result import TaskResult
from quantconvert.run.shards import ShardWriter
from quantconvert.sources import Read, open_rows
from quantconvert.sources.blocks import BlockReader, recast
from quantconvert.sources.rows import Rows, read_vector, tiles
from quantconvert.spans import spans

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
    advance: Callable[[str, int], None]

    def carry_out(self, task: Task) -> TaskResult:
        """Do the whole task; its bytes are in the shard afterwards, not yet durable."""
        noise = None
        match task:
            case Copy():
                self._copy(task)
            case Split():
                self._split(task)
            case Quantize():
                noise = self._quantize(task)
            case Repack():
                self._repack(task)
            case Decode():
                self._decode(task)
        return TaskResult(self.writer.sums(task, self.work, lambda: self.advance(task.source.name, 0)), noise)

    def _copy(self, task: Copy) -> None:
        """Bytes as they are, without passing through this process where the file systems can do it."""
        (output,), ref = task.outputs, task.source.values
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

    def _stream(self, task: Quantize | Repack | Decode, make: Callable[[int, int], Iterator[Tile]]) -> None:
        """Write what `make(begin, end)` yields for each slab of rows: straight away, or turned once a slab is full."""
        rows, nbytes = task.source.matrix[0], task.source.nbytes
        reported = 0
        for begin, end in spans(0, rows, task.cut.slab_rows):
            slabs = self._slabs(task, end - begin)
            for first, count, blocks in make(begin, end):
                for output in task.outputs:
                    spec, block = output.spec, blocks[output.spec.suffix]
                    assert block.dtype == torch_dtype(spec.dtype), f"{output.name}: {block.dtype} is not {spec.dtype}"
                    if spec.transposed:
                        at = (first - begin) // spec.rows_per_element
                        slabs[spec.suffix][at : at + block.shape[0]] = block
                    else:
                        self.writer.write_rows(output, block, first)
                done = nbytes * (first + count) // rows
                self.advance(task.source.name, done - reported)
                reported = done
            for output in task.outputs:
                if output.spec.transposed:
                    self.writer.write_turned(output, slabs[output.spec.suffix], begin, self.work)
        self.work.trim(self.execution.memory_limit // self.execution.workers)

    def _rows(self, read: Read) -> Rows:
        return open_rows(read, self.files, self.work, self.execution.slab_nbytes)

    def _quantize(self, task: Quantize) -> tuple[float, float]:
        source, scheme = task.source, task.scheme
        rows, count, tile_rows = self._rows(source), source.matrix[0], task.cut.tile_rows
        method = METHODS[task.method]
        noise = Noise(lambda shape: self.work.tensor("rounded", torch.float32, shape))
        try:
            heard = self._heard(source.name, tiles(rows, 0, count, tile_rows))
            span = method.span(heard, scheme, inputs_of(task, self.files))
            encode = _encoder(task, rows, span, noise, input_max_of(task, self.files))

            def make(begin: int, end: int) -> Iterator[Tile]:
                for first, last in spans(begin, end, tile_rows):
                    yield first, last - first, encode(first, last)

            self._stream(task, make)
            return noise.noise, noise.signal
        except NonFinite:
            raise nonfinite_error(source, self._nonfinite(source)) from None
        except ScaleOverflow:
            raise overflow_error(source, task.layout) from None
        except BadInputs as error:
            raise inputs_error(source, error) from None

    def _nonfinite(self, source: Read) -> tuple[int, int, tuple[int, ...]]:
        """What of a weight is not finite: as it is stored, before a step spread it, if it is not the step's own."""
        stored = count_nonfinite(self._rows(replace(source, steps=())), source)
        return stored if any(stored[:2]) else count_nonfinite(self._rows(source), source)

    def _heard(self, name: str, read: Iterator[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """The tiles of a first pass, which tells of no progress but must stop when all workers do."""
        for _, w_OI in read:
            self.advance(name, 0)
            yield w_OI

    def _decode(self, task: Decode) -> None:
        """A stored weight as plain floats."""
        rows, (output,) = self._rows(task.source), task.outputs
        dtype = torch_dtype(output.spec.dtype)

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, w_OI in tiles(rows, begin, end, task.cut.tile_rows):
                yield first, w_OI.shape[0], {output.spec.suffix: plain(task, w_OI, dtype, rows)}

        self._stream(task, make)

    def _split(self, task: Split) -> None:
        """One expert's share of the biases, as it is."""
        part = read_vector(task.source, self.files)
        assert part.numel() * part.element_size() == task.outputs[0].nbytes, task.source.name
        self.writer.write_rows(task.outputs[0], part, 0)
        self.advance(task.source.name, task.source.nbytes)

    def _repack(self, task: Repack) -> None:
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

        self._stream(task, make)

    def _slabs(self, task: Quantize | Repack | Decode, num_rows: int) -> dict[str, Tensor]:
        """Where the blocks of transposed outputs are gathered, by suffix, row axis first."""
        specs = [output.spec for output in task.outputs if output.spec.transposed]
        return {
            spec.suffix: self.work.tensor(
                spec.suffix, torch_dtype(spec.dtype), (-(-num_rows // spec.rows_per_element), spec.shape[0])
            )
            for spec in specs
        }


def _encoder(
    task: Quantize, rows: Rows, span: Any, noise: Noise, input_max: float | None
) -> Callable[[int, int], dict[str, Tensor]]:
    """From a range of rows to blocks by suffix: a registered kernel where there is one, else decode, quantize, encode.

    The three calls are the reference: a kernel does in one what they do, to the bit.
    """
    source, scheme = task.source, task.scheme
    method, layout = METHODS[task.method], LAYOUTS[task.layout]
    dtype, scale_dtype = torch_dtype(source.dtype), torch_dtype(layout.scale_dtype(source.dtype))
    kernel = find_kernel(source, method, scheme, layout)
    constants = layout.constants(scheme, source.dtype, input_max)

    def fast(first: int, last: int) -> dict[str, Tensor]:
        assert kernel is not None
        return kernel(rows.raw(first, last), span, noise) | constants

    def reference(first: int, last: int) -> dict[str, Tensor]:
        quantized = method.quantize(rows.rows(first, last), scheme, dtype, scale_dtype, span, noise)
        return layout.encode(quantized, scheme, source.shape) | constants

    return fast if kernel else reference


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


def count_nonfinite(reader: Rows, source: Read) -> tuple[int, int, tuple[int, ...]]:
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


def nonfinite_text(found: tuple[int, int, tuple[int, ...]]) -> str:
    """`3 NaN, 1 Inf, first at [0, 17]`."""
    nan, inf, first = found
    counts = ", ".join(f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "Inf")) if count)
    return f"{counts}, first at {list(first)}"


def nonfinite_error(ref: Read, found: tuple[int, int, tuple[int, ...]]) -> CheckpointError:
    return CheckpointError(
        f"tensor `{ref.name}` in `{ref.file}` holds {nonfinite_text(found)}: expected finite weights",
        hint="--nan-policy keep leaves such tensors (and what is fused with them) unquantized",
    )


def inputs_error(ref: Read, error: BadInputs) -> CheckpointError:
    return CheckpointError(f"tensor `{ref.name}`: {error}: expected what its {ref.matrix[1]} inputs can be")


def overflow_error(ref: Read, fmt: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor `{ref.name}` in `{ref.file}` has a scale above 65504, the largest of float16, which {fmt} stores",
        hint="--format compressed-tensors stores scales in the weight's own dtype, or --ignore this tensor",
    )
