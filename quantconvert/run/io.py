"""Bytes in: positioned reads of the source's files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from quantconvert.errors import CheckpointError


class Files:
    """Read-only descriptors of the source's files, opened once and shared by all threads (reads are positioned)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"cannot open `{file}` of the source: {error.strerror}") from error
            return self._fds[file]

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on; raises `CheckpointError` when the file ends before."""
        fd, done = self.fd(file), 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read `{file}` at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"`{file}` became shorter while it was read: expected {len(buffer)} bytes at {offset}, got {done}"
                )
            done += count

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
