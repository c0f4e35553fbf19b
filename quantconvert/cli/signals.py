"""Ctrl-C, SIGTERM and a closed terminal, in each part of the program's life."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

# Windows has no SIGHUP.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], object]


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised in the main thread so that everything is cleaned up on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def _leave(signum: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted: nothing was begun\n")
    os._exit(128 + signum)


def _stop(signum: int, frame: FrameType | None) -> None:
    for number in _heard():
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)


# Nothing is begun while modules are imported, and an exception in the middle of them can be lost or abort the process.
IMPORTING: Handler = _leave
# Stop, and journal what is done; a second signal kills at once, which the next run survives as well.
RUNNING: Handler = _stop
# The result is in place: there is nothing left to interrupt.
DONE = signal.SIG_IGN


def take_signals(handler: Handler | signal.Handlers) -> None:
    """Let `handler` answer from now on."""
    for number in _heard():
        signal.signal(number, handler)


def _heard() -> list[signal.Signals]:
    """All of them, but a hang-up that is ignored from the start: so nohup asks for it."""
    hup = getattr(signal, "SIGHUP", None)
    return [n for n in NUMBERS if n != hup or _HUP_AT_START != signal.SIG_IGN]


_HUP_AT_START = signal.getsignal(signal.SIGHUP) if hasattr(signal, "SIGHUP") else None
