"""Carrying out tasks, a part at a time. A kernel takes a weight from file to file; torch does what no kernel does.

Imports no torch until a task needs it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import fsum
from mmap import mmap
from typing import TYPE_CHECKING, NoReturn

from quantconvert.checkpoint.ranges import Files
from quantconvert.dtypes import DTYPES
from quantconvert.errors import CheckpointError
from quantconvert.kernels import Direct, Kernel, Place, Unread, Unwritten, Way, find_direct, find_transport
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import NonFinite, ScaleOverflow
from quantconvert.planning import Copy, Decode, Execution, Output, Quantize, Split, Task
from quantconvert.planning.tasks import COPY_CHUNK_NBYTES
from quantconvert.run.complaints import nonfinite_error, overflow_error
from quantconvert.run.result import Done, TaskResult
from quantconvert.run.shards import ShardWriter
from quantconvert.spans import spans

if TYPE_CHECKING:
    from quantconvert.run.tiled import Tiled

# What a copy reads and writes at a time: it stays in a core's cache.
CHUNK_NBYTES = 1 << 20


def way_of(task: Task) -> Way | None:
    """A task as kernels see it; None where it is none of theirs."""
    specs = tuple(output.spec for output in task.outputs)
    if isinstance(task, Quantize):
        layout = LAYOUTS[task.layout]
        return Way(task.source, specs, task.cut.tile_rows, task.method, task.scheme, layout)
    return Way(task.source, specs, task.cut.tile_rows) if isinstance(task, Decode) else None


def needs_torch(tasks: Iterable[Task]) -> bool:
    """Whether any of them is torch's to do."""
    for task in tasks:
        if not isinstance(task, Copy | Split):
            way = way_of(task)
            if way is None or find_direct(way) is None:
                return True
    return False


class Errand:
    """A task under way: its parts (half-open ranges of rows, of bytes for a copy), and what came of them."""

    def __init__(self, index: int, task: Task, files: Files) -> None:
        self.index, self.task = index, task
        way = way_of(task)
        here = way is not None and files.fd(task.source.values.file) is not None
        self.way, self.kernel = way, find_direct(way) if way and here else None
        self.parts = tuple(_parts(task, self.kernel))
        self._done: dict[int, Done] = {}
        self._lock = threading.Lock()
        self._direct: Direct | None = None

    def direct(self, files: Files, writer: ShardWriter) -> Direct:
        """The kernel's way, found by the first who asks."""
        with self._lock:
            if self._direct is None:
                assert self.kernel is not None
                assert self.way is not None
                places = {o.spec.suffix: Place(writer.fd(o.shard), o.offset) for o in self.task.outputs}
                self._direct = self.kernel.direct(self.way, files, places)
            return self._direct

    def add(self, begin: int, done: Done) -> bool:
        """Take what the part that begins there gave; whether that was the last one."""
        with self._lock:
            self._done[begin] = done
            return len(self._done) == len(self.parts)

    def result(self, sums: Sequence[str]) -> TaskResult:
        """What the task gave, once all parts are done. Sums of squares are those of tiles, added exactly and rounded
        once: they do not depend on parts.
        """
        parts = self._done.values()
        noise = None
        if isinstance(self.task, Quantize):
            noise = fsum(n for done in parts for n in done.noise), fsum(s for done in parts for s in done.signal)
        return TaskResult(tuple(sums), noise)

    def sum_of(self, output: Output) -> int | None:
        """The sum of an output's pieces; None where parts of pieces were written."""
        if output.spec.transposed and len(self._slabs) > 1:
            return None
        return sum(done.sums.get(output.spec.suffix, 0) for done in self._done.values())

    @property
    def _slabs(self) -> Sequence[tuple[int, int]]:
        cut = getattr(self.task, "cut", None)
        return () if cut is None else tuple(spans(0, self.task.source.matrix[0], cut.slab_rows))


def _parts(task: Task, kernel: Kernel | None) -> Iterable[tuple[int, int]]:
    if isinstance(task, Copy):
        return tuple(spans(0, task.source.values.nbytes, 4 * COPY_CHUNK_NBYTES)) or ((0, 0),)
    rows = task.source.matrix[0]
    if kernel is None or not isinstance(task, Quantize | Decode) or not rows:
        return ((0, rows),)
    return spans(0, rows, task.cut.slab_rows)


class Buffer:
    """Memory for one part at a time, as large as it was ever asked for."""

    def __init__(self) -> None:
        self._held = memoryview(b"")

    def of(self, nbytes: int) -> memoryview:
        """So many bytes, with whatever the last use left."""
        if len(self._held) < nbytes:
            self._held = memoryview(b"")
            self._held = memoryview(mmap(-1, nbytes))
        return self._held[:nbytes]

    @property
    def nbytes(self) -> int:
        return len(self._held)


class Buffers:
    """What kernels gather slabs in: as many as work at once, which may be fewer than there are workers."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(self, nbytes: int) -> Iterator[memoryview]:
        """So many bytes: of the smallest that is large enough, so that no more grow than have to."""
        with self._lock:
            self._free.sort(key=lambda buffer: buffer.nbytes)
            index = next((i for i, buffer in enumerate(self._free) if buffer.nbytes >= nbytes), 0)
            buffer = self._free.pop(index) if self._free else Buffer()
        yield buffer.of(nbytes)
        self._free.append(buffer)


class Bench:
    """What a worker needs to carry out tasks: the source, the writer, buffers, and whom to tell of progress.

    advance: called with a tensor's name and how many more of its bytes are done, 0 too; may raise to stop the task.
    """

    def __init__(
        self,
        files: Files,
        writer: ShardWriter,
        execution: Execution,
        advance: Callable[[str, int], None],
        buffers: Buffers | None = None,
    ) -> None:
        self.files, self.writer, self.execution, self.advance = files, writer, execution, advance
        self.buffers, self.transport = buffers or Buffers(), find_transport()
        self._chunk = Buffer()

    @cached_property
    def tiled(self) -> Tiled:
        """Torch's way."""
        from quantconvert.run.tiled import Tiled

        return Tiled(self.files, self.writer, self.execution, self.advance, self.writer.folder)

    def carry_out(self, index: int, task: Task) -> TaskResult:
        """Do the whole task; its bytes are in the shard afterwards, not yet durable."""
        errand = Errand(index, task, self.files)
        for part in errand.parts:
            errand.add(part[0], self.do(errand, *part))
        return self.finish(errand)

    def do(self, errand: Errand, begin: int, end: int) -> Done:
        """Do a part of a task."""
        task = errand.task
        if isinstance(task, Copy):
            return self._copy(task, begin, end)
        if isinstance(task, Split):
            return self._split(task)
        if errand.kernel is None:
            return self.tiled.carry_out(task)
        assert isinstance(task, Quantize | Decode)
        return self._direct(errand, task, begin, end)

    def finish(self, errand: Errand) -> TaskResult:
        """The result of a task all parts of which are done."""
        task = errand.task
        if not task.has_sums:
            return TaskResult(())
        sums = []
        for output in task.outputs:
            found = errand.sum_of(output)
            if found is None:
                found = self.writer.written_sum(task, output, lambda: self.advance(task.source.name, 0))
            sums.append(self.writer.sums.text(found))
        return errand.result(sums)

    def _copy(self, task: Copy, begin: int, end: int) -> Done:
        """Bytes as they are. The system's own copying of a range costs more: tensors lie across blocks of files."""
        (output,), ref = task.outputs, task.source.values
        source, transport = self.files.fd(ref.file), self.transport
        buffer = self._chunk.of(CHUNK_NBYTES)
        if source is not None and transport is not None:
            target = self.writer.fd(output.shard), output.offset + begin
            try:
                transport.copy((source, ref.offset + begin), target, end - begin, buffer)
            except Unread:
                self._read_again(ref.file, ref.offset + begin, end - begin)
            except Unwritten as error:
                raise self.writer.error(output, os.strerror(error.args[0])) from error
        else:
            for first, last in spans(begin, end, CHUNK_NBYTES):
                self.files.read_into(ref.file, buffer[: last - first], ref.offset + first)
                self.writer.write(output, buffer[: last - first], first)
        self.advance(ref.name, end - begin)
        return Done({})

    def _split(self, task: Split) -> Done:
        """One expert's share of a vector, as it is."""
        (output,), ref, view = task.outputs, task.source.values, task.source.view
        size, width = DTYPES[ref.dtype].bits // 8, ref.shape[-1]
        raw = memoryview(bytearray(width * size))
        self.files.read_into(ref.file, raw, ref.offset + (view.expert or 0) * width * size)
        numbers = [raw[i : i + size] for i in range(0, len(raw), size)][view.start :: view.step][: task.source.shape[0]]
        part = memoryview(bytearray().join(numbers))
        assert len(part) == output.nbytes, task.source.name
        self.advance(task.source.name, task.source.nbytes)
        return Done({output.spec.suffix: self.writer.write_piece(output, part, 0)})

    def _direct(self, errand: Errand, task: Quantize | Decode, begin: int, end: int) -> Done:
        source, name = task.source, task.source.name
        try:
            direct = errand.direct(self.files, self.writer)
            with self.buffers.borrowed(direct.nbytes(begin, end)) as buffer:
                written = direct.convert(begin, end, buffer)
        except NonFinite:
            if isinstance(task, Decode):  # it knows what may stay so
                return self.tiled.decode(task, begin, end)
            raise nonfinite_error(source, self.tiled.nonfinite(source)) from None
        except ScaleOverflow:
            assert isinstance(task, Quantize)
            raise overflow_error(source, task.layout) from None
        except Unread:
            self._read_again(source.file, source.values.offset, source.values.nbytes)
        except Unwritten as error:
            output = next(o for o in task.outputs if o.spec.suffix == error.args[1])
            raise self.writer.error(output, os.strerror(error.args[0])) from error
        sums = dict(written.sums)
        if begin == 0 and isinstance(task, Quantize):
            for suffix, values in LAYOUTS[task.layout].shaped(task.scheme, source.shape).items():
                output = next(o for o in task.outputs if o.spec.suffix == suffix)
                sums[suffix] = self.writer.write_piece(output, memoryview(values).cast("B"), 0)
        rows = source.matrix[0]
        self.advance(name, source.nbytes * end // rows - source.nbytes * begin // rows)
        return Done(sums, written.noise, written.signal)

    def _read_again(self, file: str, offset: int, nbytes: int) -> NoReturn:
        """Raise why a range could not be read, by reading it once more."""
        buffer = memoryview(bytearray(CHUNK_NBYTES))
        for begin, end in spans(0, nbytes, CHUNK_NBYTES):
            self.files.read_into(file, buffer[: end - begin], offset + begin)
        raise CheckpointError(f"cannot read `{file}` at byte {offset}")
