"""The streaming shard writer: files of known size, tensors at planned offsets in any order. It knows bytes only."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quantconvert import machine
from quantconvert.buffers import Workspace, bytes_of
from quantconvert.errors import OutputError
from quantconvert.planning import Output, Plan, Task
from quantconvert.run.disk import fsync_folder, write_all
from quantconvert.run.partial import open_partial, read_back
from quantconvert.run.result import Checksums
from quantconvert.spans import spans

READ_NBYTES = 1 << 20


class _Sum:
    """The checksum of one tensor's bytes as long as they are written from first to last."""

    __slots__ = ("end", "hash")

    def __init__(self) -> None:
        self.hash, self.end = hashlib.sha256(), 0


class ShardWriter:
    """Writes into the partial files of a plan's shards in `folder`.

    Safe for several threads, and beside writers of other processes, as long as each task is one thread's.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._fds: dict[int, int] = {}
        self._sums: dict[str, _Sum] = {}
        self._lock = threading.Lock()

    def fd(self, shard: int) -> int:
        """The descriptor of a shard's partial file, created on first use."""
        with self._lock:
            if shard not in self._fds:
                self._fds[shard] = open_partial(self.folder, self.plan.shards[shard])
            return self._fds[shard]

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
        for output in task.outputs if task.has_sums else ():
            written = self._sums.pop(output.name, None) or _Sum()
            if written.end != output.nbytes:
                written = _Sum()
                for part in self._read_back(output, work):
                    pulse()
                    written.hash.update(part)
            found.append(written.hash.hexdigest())
        return tuple(found)

    def _read_back(self, output: Output, work: Workspace) -> Iterator[memoryview]:
        """What the file holds of a tensor. Each part overwrites the one before."""
        for begin, end in spans(0, output.nbytes, READ_NBYTES):
            part = bytes_of(work.tensor("back", torch.uint8, (end - begin,)))
            read_back(self.fd(output.shard), output, begin, part)
            yield part

    def sync(self) -> None:
        """Make what was written durable, and the names of the files: for a process whose ledger is elsewhere."""
        try:
            for fd in self._fds.values():
                machine.sync_data(fd)
            fsync_folder(self.folder)
        except OSError as error:
            raise OutputError(f"cannot sync `{self.folder}`: {error.strerror}") from error

    def release(self, shard: int) -> None:
        """Close a file that is complete."""
        with self._lock:
            fd = self._fds.pop(shard, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close what is still open."""
        for shard in list(self._fds):
            self.release(shard)
