"""The streaming shard writer: files of known size, tensors at planned offsets in any order, complete or invisible.

A file exists under a `.partial` name, at its final size and with its header, from the first write on. Workers write and
count tasks off; one thread, the one that calls `flush`, makes bytes durable, then journals the tasks, then gives a file
whose tasks are all done its name.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.errors import OutputError
from quantconvert.planning import Copy, Output, Plan, Shard, Task
from quantconvert.run.disk import fsync_folder, write_all
from quantconvert.run.journal import Checksums, Journal
from quantconvert.spans import spans

# Finished work is made durable once there is this much of it, or it is this old. Bounds what a kill costs, and, as a
# sync cannot be interrupted, how long an interrupted run takes to end.
FLUSH_NBYTES, FLUSH_SECONDS = 128_000_000, 1.0
# Workers pause while this much finished work waits for a disk that is slower than they are.
MAX_WAITING_NBYTES = 512_000_000
READ_NBYTES = 1 << 20


class _Sum:
    """The checksum of one tensor's bytes as long as they are written from first to last."""

    __slots__ = ("end", "hash")

    def __init__(self) -> None:
        self.hash, self.end = hashlib.sha256(), 0


class ShardWriter:
    """Writes the plan's shards into `folder`. Safe for several threads as long as each task is one thread's."""

    def __init__(self, plan: Plan, folder: Path, journal: Journal, on_complete: Callable[[Shard], None]) -> None:
        self.plan, self.folder, self.journal, self.on_complete = plan, folder, journal, on_complete
        self.waiting_nbytes = 0
        self._fds: dict[int, int] = {}
        self._created: set[int] = set()
        self._sums: dict[str, _Sum] = {}
        self._sums_of: dict[int, Checksums] = {}
        self._left = Counter(task.outputs[0].shard for task in plan.tasks)
        self._waiting: list[int] = []
        self._flushed_at = time.monotonic()
        self._failed = False
        self._lock = threading.Lock()

    def fd(self, shard: int) -> int:
        """The descriptor of a shard's partial file, created with its header and final size on first use."""
        with self._lock:
            if shard not in self._fds:
                self._fds[shard] = self._open(self.plan.shards[shard])
                self._created.add(shard)
            return self._fds[shard]

    def _open(self, shard: Shard) -> int:
        """What an interrupted run left is taken as it is: its journal says which of its bytes count."""
        partial, whole = self.folder / f"{shard.file}.partial", self.folder / shard.file
        try:
            if whole.exists():
                whole.replace(partial)
            fd = os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"cannot create `{shard.file}`: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size > shard.nbytes:
                os.ftruncate(fd, shard.nbytes)
            if shard.nbytes:
                os.posix_fallocate(fd, 0, shard.nbytes)
            write_all(fd, memoryview(shard.header), 0)
        except OSError as error:
            os.close(fd)
            raise OutputError(f"cannot write `{shard.file}` of {shard.nbytes} bytes: {error.strerror}") from error
        return fd

    def write_rows(self, output: Output, block: Tensor, first_row: int) -> None:
        """Write a block, row axis first, that source rows from `first_row` on make of `output`, stored as it is.

        A block that does not depend on rows is written with the first rows only.
        """
        rows = output.spec.rows_per_element
        if rows:
            self._pwrite(output, bytes_of(block.contiguous()), output.offset_of_row(first_row // rows))
        elif first_row == 0:
            self._pwrite(output, bytes_of(block), 0)

    def write_turned(self, output: Output, block: Tensor, first_row: int, work: Workspace) -> None:
        """Write a block, row axis first, of an `output` that is stored transposed: a part of each of its rows."""
        turned = work.tensor("turned", block.dtype, (block.shape[1], block.shape[0]))
        turned.copy_(block.t())
        data, total = bytes_of(turned), output.spec.shape[-1]
        if block.shape[0] == total:
            self._pwrite(output, data, 0)
            return
        part, stride = block.shape[0] * block.element_size(), total * block.element_size()
        begin = first_row // output.spec.rows_per_element * block.element_size()
        for row in range(block.shape[1]):
            self._pwrite(output, data[row * part : (row + 1) * part], row * stride + begin)

    def _pwrite(self, output: Output, data: memoryview, offset: int) -> None:
        assert offset + len(data) <= output.nbytes, (output.name, offset, len(data), output.nbytes)
        try:
            write_all(self.fd(output.shard), data, output.offset + offset)
        except OSError as error:
            file = self.plan.shards[output.shard].file
            raise OutputError(f"cannot write tensor `{output.name}` in `{file}`: {error.strerror}") from error
        written = self._sums.setdefault(output.name, _Sum())
        if written.end == offset:  # otherwise what follows is out of order too, and is read back in the end
            written.hash.update(data)
            written.end += len(data)

    def sums(self, task: Task, work: Workspace, pulse: Callable[[], None]) -> Checksums:
        """Checksums of a task's outputs: of what was written, or of what is in the file where that was out of order.

        A copy has none. `pulse` is called now and then, and may raise.
        """
        found = []
        for output in () if isinstance(task, Copy) else task.outputs:
            written = self._sums.pop(output.name, None) or _Sum()
            if written.end != output.nbytes:
                written = _Sum()
                for _, part in self.read_back(output, work):
                    pulse()
                    written.hash.update(bytes_of(part))
            found.append(written.hash.hexdigest())
        return tuple(found)

    def read_back(self, output: Output, work: Workspace) -> Iterator[tuple[int, Tensor]]:
        """What the file holds of a tensor: (first byte, uint8 [bytes]). Each part overwrites the one before."""
        fd = self.fd(output.shard)
        for begin, end in spans(0, output.nbytes, READ_NBYTES):
            part = work.tensor("back", torch.uint8, (end - begin,))
            data = bytes_of(part)
            try:
                while data:
                    count = os.preadv(fd, [data], output.offset + end - len(data))
                    if count == 0:
                        raise OutputError(f"the file of tensor `{output.name}` was made shorter by somebody else")
                    data = data[count:]
            except OSError as error:
                raise OutputError(f"cannot read back tensor `{output.name}`: {error.strerror}") from error
            yield begin, part

    def task_done(self, index: int, sums: Checksums) -> None:
        """Count a task off; the next `flush` journals it, unless it is in the journal already."""
        task = self.plan.tasks[index]
        with self._lock:
            self._sums_of[index] = sums
            self._left[task.outputs[0].shard] -= 1
            if self.journal.done.get(index) != sums:
                self._waiting.append(index)
                self.waiting_nbytes += task.output_nbytes

    @property
    def due(self) -> bool:
        """Whether enough finished work waits for a `flush`."""
        return self.waiting_nbytes >= FLUSH_NBYTES or time.monotonic() - self._flushed_at >= FLUSH_SECONDS

    def flush(self) -> None:
        """Make finished tasks durable and journal them; name the files that are complete. For one thread only.

        After one failure nothing is journalled any more: the system reports lost writes only once.
        """
        with self._lock:
            batch = list(self._waiting)
            complete = [shard for shard in self._fds if self._left[shard] == 0]
        self._flushed_at = time.monotonic()
        if self._failed or not (batch or complete):
            return
        tasks = [self.plan.tasks[index] for index in batch]
        try:
            self._sync(sorted({*complete, *(task.outputs[0].shard for task in tasks)}))
            if batch:
                self.journal.append([(index, self._sums_of[index]) for index in batch])
        except OutputError:
            self._failed = True
            raise
        with self._lock:
            del self._waiting[: len(batch)]
            self.waiting_nbytes -= sum(task.output_nbytes for task in tasks)
        for shard in complete:
            self._complete(shard)

    def _sync(self, shards: list[int]) -> None:
        for shard in shards:
            try:
                os.fdatasync(self._fds[shard])
                if shard in self._created:
                    fsync_folder(self.folder)
                    self._created.discard(shard)
            except OSError as error:
                raise OutputError(f"cannot sync `{self.plan.shards[shard].file}`: {error.strerror}") from error

    def _complete(self, shard: int) -> None:
        done = self.plan.shards[shard]
        os.close(self._fds.pop(shard))
        try:
            (self.folder / f"{done.file}.partial").replace(self.folder / done.file)
        except OSError as error:
            raise OutputError(f"cannot rename `{done.file}`: {error.strerror}") from error
        self.on_complete(done)

    def close(self) -> None:
        """Close what is still open; complete files stay, partial ones stay partial."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
