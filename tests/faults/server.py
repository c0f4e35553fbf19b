"""Conversions in forked children that die, or whose disk fails, at a chosen call. Run as a process of its own.

Reads one JSON request a line, answers with one JSON object a line. It has torch loaded and its threads ended when it
forks, so that a child costs a few hundredths of a second. The seam is the functions of `os` that change a disk;
the C library writes through them too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # it is run as a file
from tests.written_through import written_through

# What sends a request to this process and gives its answer.
Ask = Callable[..., Any]
WRITES = ("pwrite", "posix_fallocate")
CALLS = (*WRITES, "open", "ftruncate", "fsync", "fdatasync", "replace", "mkdir", "unlink", "rmdir")


class Seam:
    """Counts the calls of each kind and does to one of them what `fault` says.

    kind, nth: which call. at: `before`, `half` (half of the bytes are written first) or `after` kill the process;
    `error` raises `errno`, from then on always where `lasting`; `short` writes half of what every call is asked to.
    """

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.counts, self.lock = fault, Counter[str](), threading.Lock()
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            with self.lock:
                self.counts[name] += 1
                number = self.counts[name]
            at = self.fault.get("at")
            if at == "short":
                return real(*_half(name, args), **options)
            if name != self.fault.get("kind"):
                return real(*args, **options)
            nth = self.fault["nth"]
            if at == "error" and (number == nth or (number > nth and self.fault["lasting"])):
                if name in WRITES:
                    real(*_half(name, args), **options)
                raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]))
            if number != nth or at == "error":
                return real(*args, **options)
            if at != "before":
                with suppress(OSError):
                    real(*(_half(name, args) if at == "half" else args), **options)
            os.kill(os.getpid(), signal.SIGKILL)
            return time.sleep(60)

        return call


def _half(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that does half of the work, but some of it."""
    match name:
        case "pwrite":
            fd, data, offset = args
            return fd, data[: max(1, len(data) // 2)], offset
        case "posix_fallocate":
            return (*args[:2], max(1, args[2] // 2))
    return args


def status() -> dict[str, int]:
    """Resident bytes, descriptors and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss": pages * resource.getpagesize(),
        "fds": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def convert(request: dict[str, Any], fault: dict[str, Any]) -> dict[str, Any]:
    """One conversion, journalled task by task; what it did, or the error with the notes that it bears."""
    import quantconvert
    from quantconvert.run import ledger as books
    from quantconvert.run import work as tasks
    from quantconvert.run.executors import threads

    threads.POLL_SECONDS, books.FLUSH_NBYTES, books.FLUSH_SECONDS, books.MAX_WAITING_NBYTES = 0.001, 0, 0.0, 0
    carried: list[str] = []
    real = tasks.Bench.do

    def do(bench: tasks.Bench, errand: tasks.Errand, begin: int, end: int) -> Any:
        if begin == errand.parts[0][0]:
            carried.append(errand.task.source.name)
        return real(bench, errand, begin, end)

    tasks.Bench.do = do  # type: ignore[assignment, method-assign]
    talk: list[str] = []
    seam = Seam(fault)
    if "seconds" in fault:
        signal.setitimer(signal.ITIMER_REAL, fault["seconds"])  # its default action ends the process on the spot
    answer: dict[str, Any] = {"error": None, "notes": []}
    try:
        with written_through():
            quantconvert.convert(
                request["source"],
                request["out"],
                report=lambda event: talk.append(getattr(event, "message", "")),
                **request.get("options", {"workers": 1}),
            )
    except quantconvert.QuantConvertError as error:
        answer = {"error": str(error), "notes": getattr(error, "__notes__", [])}
    signal.setitimer(signal.ITIMER_REAL, 0)
    return answer | {"carried": carried, "talk": [text for text in talk if text], "counts": dict(seam.counts)}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Convert in a child; `killed` where it did not live to answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            text = json.dumps(convert(request, request.get("fault", {})))
        except BaseException:
            text = json.dumps({"error": traceback.format_exc(), "crashed": True})
        with os.fdopen(writing, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, code = os.waitpid(child, 0)
    return {"killed": True} if os.WIFSIGNALED(code) else {"killed": False, **json.loads(text)}


def soak(request: dict[str, Any]) -> list[dict[str, int]]:
    """Many conversions in this very process; what it holds after each."""
    import quantconvert

    found = []
    for i in range(request["soak"]):
        quantconvert.convert(request["source"], f"{request['out']}/{i}", workers=2)
        found.append(status())
    return found


def main() -> None:
    import torch

    import quantconvert

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # whatever is imported or set up on first use
        quantconvert.convert(sys.argv[1], Path(folder, "out"), workers=1)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(soak(request) if "soak" in request else answer(request)), flush=True)


if __name__ == "__main__":
    main()
