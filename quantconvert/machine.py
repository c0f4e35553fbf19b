"""Every call that not all systems have, each with a fall-back; nothing else in the package makes them.

Missing on macOS (Python's `os` documentation): sched_getaffinity, fdatasync, posix_fallocate, and preadv before version
11. Each call is looked up when it is made. At the bottom of all rooms, as planning counts cores.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from contextlib import suppress
from enum import Enum
from pathlib import Path

# What a file system answers that cannot allocate.
_CANNOT = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def cpu_count() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def roomy_folder() -> Path:
    """Where large scratch files may lie: TMPDIR, else /var/tmp, which is on a disk where /tmp may be in memory (the
    Filesystem Hierarchy Standard 3.0, section 5.15), else wherever temporary files go here.
    """
    disk = Path("/var/tmp")
    if not os.environ.get("TMPDIR") and os.access(disk, os.W_OK):
        return disk
    return Path(tempfile.gettempdir())


def peak_rss_nbytes() -> int:
    """The largest resident memory of this process so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_nbytes() -> int | None:
    """Memory that is free, or would be on demand; None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    return None


def give_back_memory() -> None:
    """Return freed memory to the system where the allocator keeps it (glibc's does, of blocks below 32 MiB)."""
    import ctypes

    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Bytes read into `buffer` from `offset` on: 0 at the end of the file, maybe fewer than there is room for."""
    into = getattr(os, "preadv", None)
    if into:
        count: int = into(fd, [buffer], offset)
        return count
    data = os.pread(fd, min(len(buffer), 1 << 22), offset)
    buffer[: len(data)] = data
    return len(data)


def allocate(fd: int, nbytes: int) -> None:
    """Make the file at least `nbytes` long with room on the disk for all of it; only long where that cannot be had."""
    allocated = getattr(os, "posix_fallocate", None)
    if allocated and nbytes:
        try:
            allocated(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    if os.fstat(fd).st_size < nbytes:
        os.ftruncate(fd, nbytes)


# Of fallocate (man 2): make a hole, keep the file's size.
_PUNCH = 0x02 | 0x01


def punch(fd: int, offset: int, nbytes: int) -> bool:
    """Give the room of a range of a file back to the disk; its bytes are zeros then. False where that cannot be had.

    Missing but on Linux, and on file systems that have no holes.
    """
    import ctypes

    if sys.platform != "linux":
        return False
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return False
    off = ctypes.c_int64 if ctypes.sizeof(ctypes.c_long) == 8 else ctypes.c_long
    return int(fallocate(fd, _PUNCH, off(offset), off(nbytes))) == 0


def can_punch(folder: Path) -> bool:
    """Whether files in a folder can give room back in parts."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(1 << 16)
            return punch(file.fileno(), 0, 1 << 16)
    except OSError:
        return False


def sync_data(fd: int) -> None:
    """Make the bytes of a file durable, and what is needed to find them."""
    os_sync = getattr(os, "fdatasync", None)
    if os_sync:
        os_sync(fd)
    else:
        sync(fd)


def sync(fd: int) -> None:
    """Make a file or folder durable. macOS empties the disk's own cache only on request (man 2 fsync)."""
    os.fsync(fd)
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError:  # a network file system has no such request
            return


class Locking(Enum):
    """What came of asking for a lock."""

    LOCKED = "locked"
    TAKEN = "another process has it"
    NONE = "no locks here"


def lock(fd: int) -> Locking:
    """Lock the file for this process until it closes it or dies, without waiting."""
    try:
        import fcntl
    except ImportError:
        return Locking.NONE
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Locking.TAKEN
    except OSError:
        return Locking.NONE
    return Locking.LOCKED
