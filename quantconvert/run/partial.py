"""Files of the result before they are complete: under a `.partial` name, at their final size, with their header."""

from __future__ import annotations

import os
from pathlib import Path

from quantconvert import machine
from quantconvert.errors import OutputError
from quantconvert.planning import Output, Shard
from quantconvert.run.disk import write_all


def open_partial(folder: Path, shard: Shard) -> int:
    """A descriptor of the shard's partial file, created with its header and room for all of it.

    What an interrupted run left is taken as it is: its journal says which of its bytes count. Several threads and
    processes may do this at the same time, except for taking back the name of a complete file, which the ledger does
    before it gives out tasks. Raises `OutputError`.
    """
    partial, whole = folder / f"{shard.file}.partial", folder / shard.file
    try:
        if whole.exists():
            whole.replace(partial)
        fd = os.open(partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"cannot create `{shard.file}`: {error.strerror}") from error
    try:
        found = os.fstat(fd).st_size
        if found > shard.nbytes:
            os.ftruncate(fd, shard.nbytes)
        if found < shard.nbytes:
            machine.allocate(fd, shard.nbytes)
        write_all(fd, memoryview(shard.header), 0)
    except OSError as error:
        os.close(fd)
        raise OutputError(f"cannot write `{shard.file}` of {shard.nbytes} bytes: {error.strerror}") from error
    return fd


def read_back(fd: int, output: Output, begin: int, buffer: memoryview) -> None:
    """Fill `buffer` with what the file holds of a tensor from its byte `begin` on; raises `OutputError`."""
    try:
        while buffer:
            count = machine.read_at(fd, buffer, output.offset + begin)
            if count == 0:
                raise OutputError(f"the file of tensor `{output.name}` was made shorter by somebody else")
            buffer, begin = buffer[count:], begin + count
    except OSError as error:
        raise OutputError(f"cannot read back tensor `{output.name}`: {error.strerror}") from error
