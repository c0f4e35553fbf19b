"""What an interrupted conversion leaves for the next run: which tasks are done.

A line of the journal is written after the bytes that it speaks of are on disk, and names their checksum. Both are
needed: the checksum is compared with what the system reads back, which may come from memory and not from the disk.
A copied tensor has no checksum: a later run compares it with the source, which is quicker and says more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantconvert import machine
from quantconvert.errors import OutputError
from quantconvert.planning import Plan, Task
from quantconvert.run.disk import read_all, write_all
from quantconvert.run.result import TaskResult


class Journal:
    """The finished tasks of one plan, by number; lines are appended, and a torn last one is dropped when opened.

    There is room from the start for all lines (zeros follow the last), so that a full disk does not lose what is done.
    Where a task has several lines, the last counts.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.done: dict[int, TaskResult] = {}
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            self._end = self._load(read_all(self._fd), plan)
            os.ftruncate(self._fd, self._end)
            machine.allocate(self._fd, sum(_line_nbytes(task) for task in plan.tasks) + self._end)
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
            end += len(line)
        return end

    def append(self, entries: Sequence[tuple[int, TaskResult]]) -> None:
        """Add tasks and make that durable; their bytes must be on disk already."""
        lines = "".join(json.dumps(entry_of(index, result)) + "\n" for index, result in entries).encode()
        try:
            write_all(self._fd, memoryview(lines), self._end)
            machine.sync(self._fd)
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
    return 128 + 30 * len(task.outputs)


def _parse(line: bytes, plan: Plan) -> tuple[int, TaskResult] | None:
    """Number and result of a task; None where the line is torn or not of this plan."""
    if not line.endswith(b"\n"):
        return None
    try:
        return parse_entry(json.loads(line), plan)
    except ValueError:
        return None


def entry_of(index: int, result: TaskResult) -> dict[str, Any]:
    """A finished task as JSON."""
    return {"task": index, "sums": result.sums, "noise": result.noise} | ({"seen": True} if result.seen else {})


def parse_entry(entry: Any, plan: Plan) -> tuple[int, TaskResult] | None:
    """The same back; None where it is not of this plan."""
    try:
        index, sums = entry["task"], tuple(entry["sums"])
        task = plan.tasks[index]
        count = len(task.outputs) if task.has_sums else 0
        noise = None if entry["noise"] is None else (float(entry["noise"][0]), float(entry["noise"][1]))
        result = TaskResult(sums, noise, entry.get("seen") is True)
        return (index, result) if index >= 0 and len(sums) == count else None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
