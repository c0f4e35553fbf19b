"""stdout and stderr that fail in an orderly way: closed before we start, or on a disk that is full."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from quantconvert.errors import OutputError


class ReaderGone(Exception):
    """Whoever read stdout has closed it. No `OSError`, for which the parser and rich have answers of their own."""


class StdoutError(OutputError):
    """stdout takes no more: its disk is full."""


class _Data(io.TextIOWrapper):
    """stdout: what cannot be written is an error with a message."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _failure(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _failure(error) from error


class _Talk(io.TextIOWrapper):
    """stderr: what cannot be written is lost, and the work goes on."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _failure(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return ReaderGone()
    return StdoutError(f"cannot write to stdout: {error.strerror}")


def mend_streams() -> None:
    """Give 0, 1 and 2 something to be, and Python streams of ours on 1 and 2.

    A file of ours that was opened as number 1 would get what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115 (as long as the process)
    sys.stdout = _stream(_Data, sys.stdout, 1)
    sys.stderr = _stream(_Talk, sys.stderr, 2)


def _stream(kind: type[io.TextIOWrapper], old: TextIO | None, number: int) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    encoding, errors = (old.encoding, old.errors) if old else ("utf-8", "backslashreplace")
    is_line_buffered = number == 2 or raw.isatty()
    return kind(io.BufferedWriter(raw), encoding, errors, line_buffering=is_line_buffered)


def drop_stdout() -> None:
    """Forget what is still to be written to stdout: nobody can read it, and the end of the process would try again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
