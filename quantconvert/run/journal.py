"""What an interrupted conversion leaves for the next run: which conversion it was, and which tasks are done.

A line of the journal is written after the bytes that it speaks of are on disk, and names their checksum. Both are
needed: the checksum is compared with what the system reads back, which may come from memory and not from the disk.
A copied tensor has no checksum: a later run compares it with the source, which is quicker and says more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import OutputError
from quantconvert.planning import Copy, Plan, Task
from quantconvert.run.disk import read_all, write_all
from quantconvert.version import __version__

STATE_VERSION = 1
# Checksums of a task's outputs, hexadecimal sha256, in the order of `Task.outputs`; none for a copy.
Checksums = tuple[str, ...]


def identity(plan: Plan) -> dict[str, Any]:
    """Everything that decides the bytes of a conversion, as flat JSON values by a name to show."""
    checkpoint = plan.checkpoint
    value: dict[str, Any] = {
        "state version": STATE_VERSION,
        "quantconvert version": __version__,
        "source": _source(checkpoint),
        "revision": checkpoint.revision,
        **dict(_flat(plan.job.to_json())),
        "format written": plan.format,
        "format of the source": plan.source_format,
        "dtype": plan.plain_dtype,
    }
    for file in (*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.rewritten_files):
        value[f"size of {file.path}"] = file.nbytes
        value[f"mtime of {file.path}"] = file.mtime_ns
    value["plan"] = plan.digest
    flat: dict[str, Any] = json.loads(json.dumps(value))
    return flat


def _source(checkpoint: Checkpoint) -> str:
    """The Hub id, or the folder in a spelling that does not depend on where the user stands."""
    return checkpoint.location if checkpoint.revision else str(Path(checkpoint.location).expanduser().resolve())


def _flat(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by their own names; those of the scheme that most weights have are not nested."""
    for key, item in value.items():
        yield from item.items() if isinstance(item, dict) else [(key, item)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`bits was 4, is 8` for every field that differs; the plan's digest only where nothing else explains it.

    A modification time that one side does not know (the same Hub repository, once from its cache) is no difference.
    """
    missing = object()
    found = []
    for key in (*old, *(key for key in new if key not in old)):
        before, now = old.get(key, missing), new.get(key, missing)
        if before == now or (key.startswith("mtime of ") and (before is None or now is None)):
            continue
        before, now = ("absent" if value is missing else json.dumps(value) for value in (before, now))
        found.append(f"`{key}` was {before}, is {now}")
    return [text for text in found if not text.startswith("`plan` ")] or found


class Journal:
    """The finished tasks of one plan, by number; lines are appended, and a torn last one is dropped when opened.

    noise: sums of squares of each quantized weight's error, and of the weight, by name; for the report.

    There is room from the start for all lines (zeros follow the last), so that a full disk does not lose what is done.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.done: dict[int, Checksums] = {}
        self.noise: dict[str, tuple[float, float]] = {}
        self._names = [task.source.name for task in plan.tasks]
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            self._end = self._load(read_all(self._fd), plan)
            os.ftruncate(self._fd, self._end)
            os.posix_fallocate(self._fd, 0, sum(_line_nbytes(task) for task in plan.tasks) + self._end)
        except OSError as error:
            self.close()
            raise OutputError(f"cannot open `{path}`: {error.strerror}") from error

    def _load(self, content: bytes, plan: Plan) -> int:
        """Take lines up to the first that is not whole; returns where that one begins."""
        end = 0
        for line in content.splitlines(keepends=True):
            entry = _parse(line, plan)
            if entry is None:
                break
            self.done[entry[0]] = entry[1]
            if entry[2] is not None:
                self.noise[self._names[entry[0]]] = entry[2]
            end += len(line)
        return end

    def append(self, entries: Sequence[tuple[int, Checksums]]) -> None:
        """Add tasks and make that durable; their bytes must be on disk already."""
        lines = "".join(
            json.dumps({"task": index, "sha256": sums, "noise": self.noise.get(self._names[index])}) + "\n"
            for index, sums in entries
        ).encode()
        try:
            write_all(self._fd, memoryview(lines), self._end)
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise OutputError(f"cannot write the journal: {error.strerror}") from error
        self._end += len(lines)
        self.done.update(entries)

    def close(self) -> None:
        """Close the file; what was appended is on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_blank(path: Path) -> bool:
    """Whether there is no journal, or one without a line."""
    return not path.exists() or not path.read_bytes().strip(b"\0")


def _line_nbytes(task: Task) -> int:
    return 128 + 70 * len(task.outputs)


def _parse(line: bytes, plan: Plan) -> tuple[int, Checksums, tuple[float, float] | None] | None:
    """Number, checksums and noise of a task; None where the line is torn or not of this plan."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
        index, sums = entry["task"], tuple(entry["sha256"])
        task = plan.tasks[index]
        count = 0 if isinstance(task, Copy) else len(task.outputs)
        noise = None if entry["noise"] is None else (float(entry["noise"][0]), float(entry["noise"][1]))
        return (index, sums, noise) if index >= 0 and len(sums) == count else None
    except (ValueError, TypeError, KeyError, IndexError):
        return None
