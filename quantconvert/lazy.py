"""Imports that wait until they are needed: torch takes seconds, and must not be interrupted half way."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def load_torch() -> None:
    """Import torch without its complaint that NumPy is missing: neither of us needs it."""
    if "torch" in sys.modules:
        return
    with _signals_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch  # noqa: F401


@contextmanager
def _signals_held() -> Iterator[None]:
    """A signal waits until the end of the block: an exception inside torch's own initialisation aborts the process.

    A second one ends the process at once. Only the main thread gets signals, and only handlers in Python can raise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(signum: int, frame: FrameType | None) -> None:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        came.append(signum)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers if callable(signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
