"""The streaming shard writer: files of known size, tensors at planned offsets in any order. It knows bytes only."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from quantconvert import machine
from quantconvert.errors import OutputError
from quantconvert.planning import Output, Plan, Task
from quantconvert.run.disk import fsync_folder, write_all
from quantconvert.run.partial import open_partial, read_back
from quantconvert.run.pieces import Sums, pieces_of


class ShardWriter:
    """Writes into the partial files of a plan's shards in `folder`.

    Safe for several threads, and beside writers of other processes, as long as each part of a task is one thread's.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()
        self.sums = Sums()

    def fd(self, shard: int) -> int:
        """The descriptor of a shard's partial file, created on first use."""
        with self._lock:
            if shard not in self._fds:
                self._fds[shard] = open_partial(self.folder, self.plan.shards[shard])
            return self._fds[shard]

    def write(self, output: Output, data: memoryview, begin: int) -> None:
        """Write bytes of `output` from its byte `begin` on."""
        assert begin + len(data) <= output.nbytes, (output.name, begin, len(data), output.nbytes)
        try:
            write_all(self.fd(output.shard), data, output.offset + begin)
        except OSError as error:
            raise self.error(output, error.strerror) from error

    def error(self, output: Output, reason: str | None) -> OutputError:
        """A tensor that could not be written."""
        file = self.plan.shards[output.shard].file
        return OutputError(f"cannot write tensor `{output.name}` in `{file}`: {reason}")

    def write_piece(self, output: Output, data: memoryview, begin: int) -> int:
        """The same of a whole piece (`run.pieces`); returns its sum."""
        self.write(output, data, begin)
        return self.sums.of(data, begin)

    def written_sum(self, task: Task, output: Output, pulse: Callable[[], None] = lambda: None) -> int:
        """The sum of all pieces of a tensor as the file has them. `pulse` is called now and then, and may raise."""
        fd, total, buffer = self.fd(output.shard), 0, bytearray()
        for begin, end in pieces_of(task, output):
            if len(buffer) != end - begin:
                buffer = bytearray(end - begin)
            pulse()
            read_back(fd, output, begin, memoryview(buffer))
            total += self.sums.of(memoryview(buffer), begin)
        return total

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
