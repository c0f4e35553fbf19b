"""One process at a time in an output folder: a lock that the kernel releases when its owner dies."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from quantconvert.errors import OutputError
from quantconvert.machine import Locking, lock


class Lock:
    """An exclusive lock on the file `path`, which holds the owner's process id."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._fd is not None

    @property
    def is_named(self) -> bool:
        """Whether the file that this object holds still has the name: nobody removed or replaced the folder."""
        return self._fd is not None and _is_named(self._fd, self.path)

    def acquire(self) -> bool:
        """Take the lock; raises `OutputError` at once where another has it. False: this file system has no locks.

        The file may be removed by an owner that ends while we open it, so only a lock on the file that has the name
        afterwards counts.
        """
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue
            try:
                supported = _try_lock(fd, self.path)
                if _is_named(fd, self.path):
                    self._fd, fd = fd, -1
                    with suppress(OSError):  # only for the other's message
                        os.ftruncate(self._fd, 0)
                        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
                    return supported
            finally:
                if fd >= 0:
                    os.close(fd)

    def release(self) -> None:
        """Give the lock back; its file stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def probe(path: Path) -> None:
    """Raise `OutputError` where a living process holds the lock `path`; nothing is created."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # no lock, or not ours to take: writing there will say so
        return
    try:
        _try_lock(fd, path)
    finally:
        os.close(fd)


def _try_lock(fd: int, path: Path) -> bool:
    answer = lock(fd)
    if answer is Locking.TAKEN:
        owner = ""
        with suppress(OSError, ValueError):
            owner = f" (process {int(os.pread(fd, 20, 0))})"
        raise OutputError(
            f"output `{path.parent.parent}` is being written by another conversion{owner}",
            hint="wait for it, or choose another folder",
        )
    return answer is Locking.LOCKED


def _is_named(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
