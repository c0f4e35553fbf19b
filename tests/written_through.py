"""The C library's writes, made by `os.pwrite` for as long as a test wants to see them or have them fail."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from quantconvert.kernels.native.library import find_library

_WRITER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@contextmanager
def written_through() -> Iterator[None]:
    """Inside the block, `os.pwrite` is what writes, whatever that is by then."""

    def write(fd: int, address: int, nbytes: int, offset: int) -> int:
        try:
            return os.pwrite(fd, memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B"), offset)
        except OSError as error:
            return -(error.errno or errno.EIO)

    library, call = find_library(), _WRITER(write)
    if library is None:
        yield
        return
    library.functions.quantconvert_write_through(call)
    try:
        yield
    finally:
        library.functions.quantconvert_write_through(None)
