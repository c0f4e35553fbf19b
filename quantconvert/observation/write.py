"""The file of statistics, written tensor by tensor: room for the header first, and the header last.

It appears under its name when it is complete, and never in the place of another file unless that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from quantconvert import machine
from quantconvert.errors import OutputError
from quantconvert.run.disk import fsync_folder, write_all


class StatisticsFile:
    """A context in which tensors are added; without `finish` nothing is left of it.

    reserve: bytes that the header takes at most.
    """

    def __init__(self, path: Path, reserve: int, overwrite: bool) -> None:
        self.path, self.overwrite = path.absolute(), overwrite
        self._partial = self.path.with_name(f".{path.name}.partial")
        self._start = 8 + -(-reserve // 8) * 8
        self._end = self._start
        self._entries: dict[str, object] = {}
        self._sum = hashlib.sha256()
        self._fd = -1

    def __enter__(self) -> StatisticsFile:
        try:
            self._fd = os.open(self._partial, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if machine.lock(self._fd) is machine.Locking.TAKEN:
                raise OutputError(f"another process writes `{self.path}`")
            os.ftruncate(self._fd, 0)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def add(self, name: str, shape: tuple[int, ...], data: memoryview) -> None:
        """One tensor of float32; raises `OutputError` where the disk takes no more."""
        try:
            write_all(self._fd, data, self._end)
        except OSError as error:
            raise self._failure(error) from error
        begin = self._end - self._start
        self._entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, begin + len(data)]}
        self._sum.update(data)
        self._end += len(data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and give the file its name."""
        whole = {"__metadata__": {**metadata, "data_sha256": self._sum.hexdigest()}, **self._entries}
        raw = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
        room = self._start - 8
        assert len(raw) <= room, f"{len(raw)} bytes of header in {room}"
        try:
            write_all(self._fd, memoryview(struct.pack("<Q", room) + raw.ljust(room)), 0)
            machine.sync(self._fd)
            self._give_name()
            fsync_folder(self.path.parent)
        except FileExistsError:
            raise OutputError(f"`{self.path}` exists", hint="--overwrite replaces it") from None
        except OSError as error:
            raise self._failure(error) from error

    def _give_name(self) -> None:
        """A link refuses where there is a file by now; some file systems have none."""
        if not self.overwrite:
            try:
                os.link(self._partial, self.path)
                return
            except FileExistsError:
                raise
            except OSError:
                if os.path.lexists(self.path):
                    raise FileExistsError from None
        self._partial.replace(self.path)

    def __exit__(self, *error: object) -> None:
        self._partial.unlink(missing_ok=True)
        os.close(self._fd)

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write `{self.path}`: {error.strerror}")
