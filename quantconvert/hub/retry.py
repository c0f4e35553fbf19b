"""Asking a server again: what may pass, and how long to wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from quantconvert.errors import CheckpointError

_T = TypeVar("_T")
LATER = "the Hub or the way to it is in trouble: give the same command again later"
# Seconds before each further attempt; a server's Retry-After counts instead, up to MAX_WAIT_SECONDS.
WAITS = (1.0, 2.0, 4.0, 8.0)
MAX_WAIT_SECONDS = 60.0
_PASSING = {408, 429, 500, 502, 503, 504}


def retried(
    call: Callable[[], _T],
    passes: Callable[[Exception], object],
    waits: Sequence[float] = WAITS,
    progress: Callable[[], int] = lambda: 0,
) -> _T:
    """What `call` returns; called again, after a while, when it fails and `passes` says that this may pass.

    progress: how far calls have got together; one that got further counts as the first.
    """
    left, before = list(waits), progress()
    while True:
        try:
            return call()
        except Exception as error:  # whatever the layers below raise
            if progress() > before:
                left, before = list(waits), progress()
            if not left or not passes(error):
                raise
            wait = left.pop(0)
            time.sleep(_asked_to_wait(error) or wait)


def reason_of(error: Exception) -> str:
    """The first line of another library's message; what follows are its own hints."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def status_of(error: Exception) -> int | None:
    """The status of an answer that says that the Hub is busy or in trouble; None for every other error."""
    status = answered(error)
    return status if status in _PASSING else None


def answered(error: Exception) -> int | None:
    """The status of the answer that an error is about, if it is about one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


# Of httpx and, beneath it, of the system: the request got no answer.
_NO_ANSWER = ("TransportError", "OfflineModeIsEnabled", "ConnectionError", "gaierror")


def is_unreachable(error: Exception) -> bool:
    return any(kind.__name__ in _NO_ANSWER for kind in type(error).__mro__)


def may_pass(error: Exception) -> bool:
    """Busy, or a connection that broke: an error of the network, with no answer, of a Hub that did answer before."""
    return status_of(error) is not None or not (answered(error) or isinstance(error, CheckpointError))


def _asked_to_wait(error: Exception) -> float | None:
    text = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(text), MAX_WAIT_SECONDS) if text.isdecimal() else None
