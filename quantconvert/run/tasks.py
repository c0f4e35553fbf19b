"""Carrying out one task: read, quantize, encode, write, slab by slab."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError, OutputError, UnsupportedError
from quantconvert.formats import get_format
from quantconvert.methods import rtn
from quantconvert.planning import Execution, Task
from quantconvert.planning.memory import COPY_CHUNK_NBYTES, Cut, cut, spans
from quantconvert.run.disk import write_all
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.run.stored import StoredReader, dequantize, recast
from quantconvert.run.writer import ShardWriter

# First row, number of rows, and blocks by suffix, row axis first.
Tile = tuple[int, int, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Bench:
    """What a worker needs to carry out tasks: the source, the writer, its own buffers, and whom to tell of progress."""

    files: Files
    writer: ShardWriter
    work: Workspace
    execution: Execution
    format: str
    source_format: str | None
    advance: Callable[[str, int], None]

    def carry_out(self, task: Task) -> None:
        """Do the whole task; its bytes are in the shard afterwards."""
        if task.operation == "copy":
            self._copy(task)
        elif task.operation == "quantize":
            self._quantize(task)
        else:
            self._transcode(task)

    def _copy(self, task: Task) -> None:
        """Bytes as they are, without passing through this process where the file systems can do it."""
        (output,) = task.outputs
        source, target = self.files.fd(task.source.file), self.writer.fd(output.shard)
        for begin, end in spans(0, task.source.nbytes, 16 * COPY_CHUNK_NBYTES):
            done = begin
            while done < end:
                count = _copy_range(source, target, end - done, task.source.offset + done, output.offset + done)
                if count == 0:
                    size = min(end - done, COPY_CHUNK_NBYTES)
                    chunk = bytes_of(self.work.tensor("raw", torch.uint8, (size,)))
                    self.files.read_into(task.source.file, chunk, task.source.offset + done)
                    try:
                        write_all(target, chunk, output.offset + done)
                    except OSError as error:
                        raise OutputError(f"cannot write tensor `{output.name}`: {error.strerror}") from error
                    count = len(chunk)
                done += count
            self.advance(task.source.name, end - begin)

    def _stream(self, task: Task, parts: Cut, make: Callable[[int, int], Iterator[Tile]]) -> None:
        """Write what `make(begin, end)` yields for each slab of rows: straight away, or turned once a slab is full."""
        rows = task.stored.shape[0] if task.stored else task.source.shape[0]
        nbytes = sum(ref.nbytes for ref in task.inputs)
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

    def _cut(self, task: Task, multiple: int) -> Cut:
        turned = sum(output.nbytes for output in task.outputs if output.transposed)
        shape, dtype = (task.stored.shape, "F32") if task.stored else (task.source.shape, task.source.dtype)
        return cut(shape, dtype, turned, multiple, self.execution)

    def _quantize(self, task: Task) -> None:
        ref, scheme, fmt = task.source, task.scheme, get_format(self.format)
        assert scheme is not None
        parts = self._cut(task, fmt.row_multiple(scheme))
        dtype, scale_dtype = torch_dtype(ref.dtype), torch_dtype(fmt.scale_dtype(ref.dtype))

        def read(begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
            return tiles(self.files, self.work, ref, begin, end, parts.tile_rows)

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, w_OI in read(begin, end):
                quantized = rtn.quantize(w_OI, scheme, dtype, scale_dtype, span)
                yield first, w_OI.shape[0], fmt.encode(quantized, scheme, ref.shape)

        try:
            span = rtn.measure_all(self._heard(ref.name, read(0, ref.shape[0])), scheme)
            self._stream(task, parts, make)
        except rtn.NonFinite:
            raise nonfinite_error(ref, count_nonfinite(self.files, ref, self.work)) from None
        except rtn.ScaleOverflow:
            raise overflow_error(ref, fmt.name) from None

    def _heard(self, name: str, read: Iterator[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """The tiles of a first pass, which tells of no progress but must stop when all workers do."""
        for _, w_OI in read:
            self.advance(name, 0)
            yield w_OI

    def _transcode(self, task: Task) -> None:
        """Stored codes into another layout, or into plain weights."""
        stored, scheme = task.stored, task.scheme
        assert stored is not None
        target = get_format(self.format) if scheme else None
        source = get_format(self.source_format or "")
        multiple = source.row_multiple(stored.scheme)
        parts = self._cut(task, max(multiple, target.row_multiple(scheme)) if target and scheme else multiple)
        reader = StoredReader(source, stored, self.files, self.work)
        dtype = torch_dtype(task.outputs[0].dtype)

        def make(begin: int, end: int) -> Iterator[Tile]:
            for first, last in spans(begin, end, parts.tile_rows):
                quantized = reader.rows(first, last)
                if target and scheme:
                    scale_dtype = torch_dtype(target.scale_dtype(reader.scale_tag))
                    yield (
                        first,
                        last - first,
                        target.encode(recast(quantized, scale_dtype, stored), scheme, stored.shape),
                    )
                else:
                    weight = dequantize(quantized, stored.scheme, reader.column_groups).to(dtype)
                    if not bool(torch.isfinite(weight).all()):
                        raise UnsupportedError(
                            f"`{stored.module}` has weights that {task.outputs[0].dtype} does not hold",
                            hint="--dtype bfloat16 or float32",
                        )
                    yield first, last - first, {"weight": weight}

        self._stream(task, parts, make)

    def _slabs(self, task: Task, num_rows: int) -> dict[str, Tensor]:
        """Where the blocks of transposed outputs are gathered, by suffix, row axis first."""
        return {
            o.suffix: self.work.tensor(o.suffix, torch_dtype(o.dtype), (-(-num_rows // o.rows_per_element), o.shape[0]))
            for o in task.outputs
            if o.transposed
        }


def tiles(
    files: Files,
    work: Workspace,
    ref: TensorRef,
    begin: int,
    end: int,
    tile_rows: int,
    columns: tuple[int, int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Rows begin..end of `ref`, a tile at a time: (first row, float32 [O, I]). Each tile overwrites the one before.

    columns: read only these of each row, half-open.
    """
    row_nbytes = ref.nbytes // ref.shape[0]
    left, right = columns or (0, ref.shape[1])
    for first, last in spans(begin, end, tile_rows):
        shape = (last - first, right - left)
        raw = work.tensor("raw", torch_dtype(ref.dtype), shape)
        if right - left == ref.shape[1]:
            files.read_into(ref.file, bytes_of(raw), ref.offset + first * row_nbytes)
        else:
            for i in range(last - first):
                offset = ref.offset + (first + i) * row_nbytes + left * raw.element_size()
                files.read_into(ref.file, bytes_of(raw[i]), offset)
        yield first, work.tensor("float", torch.float32, shape).copy_(raw)


def _copy_range(source: int, target: int, count: int, source_offset: int, target_offset: int) -> int:
    """Bytes copied inside the kernel; 0 where it cannot."""
    try:
        return os.copy_file_range(source, target, count, source_offset, target_offset)
    except OSError:
        return 0


def count_nonfinite(files: Files, ref: TensorRef, work: Workspace) -> tuple[int, int, tuple[int, ...]]:
    """How many NaN and Inf a tensor holds, and the index of the first of them."""
    nan = inf = 0
    first: tuple[int, ...] = ()
    rows = max(1, (1 << 18) // max(1, ref.shape[1]))
    for begin, w_OI in tiles(files, work, ref, 0, ref.shape[0], rows):
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


def nonfinite_error(ref: TensorRef, found: tuple[int, int, tuple[int, ...]]) -> CheckpointError:
    return CheckpointError(
        f"tensor `{ref.name}` in `{ref.file}` holds {nonfinite_text(found)}: expected finite weights",
        hint="--nan-policy keep leaves such tensors (and what is fused with them) unquantized",
    )


def overflow_error(ref: TensorRef, fmt: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor `{ref.name}` in `{ref.file}` has a scale above 65504, the largest of float16, which {fmt} stores",
        hint="--format compressed-tensors stores scales in the weight's own dtype, or --ignore this tensor",
    )
