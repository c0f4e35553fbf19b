"""The streaming shard writer: files of known size, tensors at planned offsets in any order, complete or invisible.

A file exists under a `.partial` name, at its final size and with its header, from the first write on; when its last
task is done it is synced to disk and renamed.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from quantconvert.errors import OutputError
from quantconvert.planning import Output, Plan, Shard
from quantconvert.run.io import Workspace, bytes_of, write_all


class ShardWriter:
    """Writes the plan's shards into `folder`. Safe for several threads as long as each task is one thread's."""

    def __init__(self, plan: Plan, folder: Path, on_complete: Callable[[Shard], None]) -> None:
        self.plan = plan
        self.folder = folder
        self.on_complete = on_complete
        self._fds: dict[int, int] = {}
        self._left = Counter(task.outputs[0].shard for task in plan.tasks)
        self._lock = threading.Lock()

    def fd(self, shard: int) -> int:
        """The descriptor of a shard's partial file, created with its header and final size on first use."""
        with self._lock:
            if shard not in self._fds:
                self._fds[shard] = self._create(self.plan.shards[shard])
            return self._fds[shard]

    def _create(self, shard: Shard) -> int:
        flags = os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC
        try:
            fd = os.open(self.folder / f"{shard.file}.partial", flags, 0o644)
        except OSError as error:
            raise OutputError(f"cannot create `{shard.file}`: {error.strerror}") from error
        try:
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
        if output.rows_per_element:
            self._pwrite(
                output, bytes_of(block.contiguous()), output.offset_of_row(first_row // output.rows_per_element)
            )
        elif first_row == 0:
            self._pwrite(output, bytes_of(block), 0)

    def write_turned(self, output: Output, block: Tensor, first_row: int, work: Workspace) -> None:
        """Write a block, row axis first, of an `output` that is stored transposed: a part of each of its rows."""
        turned = work.tensor("turned", block.dtype, (block.shape[1], block.shape[0]))
        turned.copy_(block.t())
        data, total = bytes_of(turned), output.shape[-1]
        if block.shape[0] == total:
            self._pwrite(output, data, 0)
            return
        part, stride = block.shape[0] * block.element_size(), total * block.element_size()
        begin = first_row // output.rows_per_element * block.element_size()
        for row in range(block.shape[1]):
            self._pwrite(output, data[row * part : (row + 1) * part], row * stride + begin)

    def _pwrite(self, output: Output, data: memoryview, offset: int) -> None:
        assert offset + len(data) <= output.nbytes, (output.name, offset, len(data), output.nbytes)
        try:
            write_all(self.fd(output.shard), data, output.offset + offset)
        except OSError as error:
            file = self.plan.shards[output.shard].file
            raise OutputError(f"cannot write tensor `{output.name}` in `{file}`: {error.strerror}") from error

    def task_done(self, shard: int) -> None:
        """Count a task off; the last one of a shard syncs the file and gives it its name."""
        with self._lock:
            self._left[shard] -= 1
            if self._left[shard]:
                return
            fd = self._fds.pop(shard)
        done = self.plan.shards[shard]
        try:
            os.fsync(fd)
        except OSError as error:
            raise OutputError(f"cannot sync `{done.file}`: {error.strerror}") from error
        finally:
            os.close(fd)
        (self.folder / f"{done.file}.partial").replace(self.folder / done.file)
        self.on_complete(done)

    def close(self) -> None:
        """Close what is still open; complete files stay, partial ones stay partial."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
