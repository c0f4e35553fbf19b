"""Bytes on disk by positioned calls, without torch; everything that a conversion writes passes through here."""

from __future__ import annotations

import os
from pathlib import Path
from secrets import token_hex

from quantconvert.checkpoint.ranges import RangeReader
from quantconvert.machine import sync


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """`pwrite` until everything is written."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def read_all(fd: int) -> bytes:
    """The whole file, from its start."""
    parts, done = [], 0
    while part := os.pread(fd, 1 << 20, done):
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def write_file(path: Path, content: bytes) -> None:
    """A complete file, on disk."""
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, memoryview(content), 0)
        sync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, whoever else writes it; an old one of that name is replaced."""
    partial = path.with_name(f"{path.name}.{token_hex(8)}.partial")
    try:
        write_file(partial, content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def copy_file(source: RangeReader, target: Path) -> None:
    """The content of a file of the source into a new one, on disk."""
    fd = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        nbytes = source.version().nbytes
        buffer = memoryview(bytearray(min(nbytes, 1 << 22)))
        for begin in range(0, nbytes, 1 << 22):
            part = buffer[: nbytes - begin]
            source.read_into(part, begin)
            write_all(fd, part, begin)
        sync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: files created, renamed, removed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)
