"""Reading a source by ranges: a reader for each file, and the readers of one repository, opened once and shared."""

from __future__ import annotations

import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from quantconvert.errors import CheckpointError
from quantconvert.machine import read_at


class Version(NamedTuple):
    """What tells one content of a file from another; None where a place does not say.

    nbytes: its size. mtime_ns, ctime_ns: when its content, and anything about it, was last changed; the second cannot
    be set back, and changes when another file takes the name. (Its inode would add nothing but false alarms: file
    systems in user space number a file anew.) etag: the checksum that a Hub has for it.
    """

    nbytes: int
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    etag: str | None = None

    def matches(self, other: Version) -> bool:
        """Whether nothing that both know differs."""
        return all(a == b for a, b in zip(self, other, strict=True) if a is not None and b is not None)


# What takes bytes as they come, and where in the file they begin.
Take = Callable[[bytes, int], None]


class Wrong(CheckpointError):
    """A server sent something else than it was asked for."""


class RangeReader(Protocol):
    """One file of a source, for several threads at once: every read says where it begins."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on; raises `CheckpointError` when the file ends before, or cannot be read."""
        ...

    def version(self) -> Version:
        """What the file is now."""
        ...

    def fileno(self) -> int | None:
        """A descriptor for positioned reads where the bytes are on this machine; None where they are not."""
        ...

    def close(self) -> None:
        """Give up what is open."""
        ...


class RemoteReader(ABC):
    """A file that is not on this machine."""

    @abstractmethod
    def fetch(self, offset: int, nbytes: int, take: Take) -> None:
        """Hand `nbytes` bytes from `offset` on to `take`, in order.

        Raises `CheckpointError` when the file ends before, or cannot be read, and what `take` raises.
        """

    @abstractmethod
    def version(self) -> Version:
        """What the file is."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        def take(data: bytes, at: int) -> None:
            buffer[at - offset : at - offset + len(data)] = data

        self.fetch(offset, len(buffer), take)

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        return None


class LocalReader:
    """A file on this machine. `name` stands for it in messages; raises `CheckpointError` when it cannot be opened."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        try:
            self._fd = open_regular(str(path), os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot open `{name}` of the source: {error.strerror}") from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset` on; raises `CheckpointError`, also where the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = read_at(self._fd, buffer[done:], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read `{self.name}` at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"`{self.name}` became shorter while it was read:"
                    f" expected {len(buffer)} bytes at {offset}, got {done}"
                )
            done += count

    def version(self) -> Version:
        status = os.fstat(self._fd)
        return Version(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def fileno(self) -> int | None:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Opener(Protocol):
    """What has files: a repository, or a part of one."""

    def open(self, path: str) -> RangeReader:
        """The file as ranges of bytes; raises `CheckpointError` where there is none."""
        ...


class Files:
    """The readers of a repository's files, opened on first use and shared by all threads.

    beside: files by name that are not the repository's but are read like them.
    """

    def __init__(self, repo: Opener, beside: Mapping[str, Path] | None = None) -> None:
        self.repo, self.beside = repo, beside or {}
        self._readers: dict[str, RangeReader] = {}
        self._lock = threading.Lock()

    def reader(self, file: str) -> RangeReader:
        """The open reader of `file`."""
        with self._lock:
            if file not in self._readers:
                path = self.beside.get(file)
                self._readers[file] = LocalReader(path, file) if path else self.repo.open(file)
            return self._readers[file]

    def fd(self, file: str) -> int | None:
        """A descriptor for positioned reads, where the file is on this machine."""
        return self.reader(file).fileno()

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on; raises `CheckpointError` when the file ends before."""
        self.reader(file).read_into(buffer, offset)

    def close(self) -> None:
        """Close all of them."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def open_regular(path: str, flags: int) -> int:
    """An `opener` that neither waits for the other end of a fifo nor reads from a device."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file", path)
    return fd
