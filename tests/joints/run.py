"""A conversion with a toy registered, in a process that kills itself: python -m tests.joints.run TOY SRC OUT JSON N."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import quantconvert
from quantconvert.events import Event, Progress, Started
from quantconvert.run import ledger
from quantconvert.run.executors import threads
from tests.joints.table import TOYS


def main(name: str, source: str, out: str, options: str, kill_after: str) -> None:
    ledger.FLUSH_NBYTES, ledger.FLUSH_SECONDS, threads.POLL_SECONDS = 0, 0.0, 0.001
    journal = Path(out, ".quantconvert", ".journal")
    seen: set[str] = set()
    passes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Started):
            passes.append(event.word)
        if isinstance(event, Progress) and passes[-1] == "converting":  # a first pass journals nothing
            seen.add(event.name)
            if len(seen) > int(kill_after):
                while not journal.read_bytes().strip(b"\0"):  # room for all lines is there from the start
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGKILL)

    with TOYS[name].registered():
        quantconvert.convert(source, out, report=report, **json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
