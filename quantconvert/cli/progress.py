"""Progress: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from quantconvert.cli.output import plain, size, stderr
from quantconvert.events import Event, Note, Progress, ShardWritten, Started
from quantconvert.text import printable

LOG_EVERY_SECONDS = 10.0


class ProgressReporter:
    """A `Reporter` for stderr. On a terminal a bar with tensor, GB/s and ETA; else one line every ten seconds."""

    def __init__(self, *, verbose: bool = False) -> None:
        self._tty = sys.stderr.isatty()
        self._verbose = verbose
        self._bar: tqdm[None] | None = None
        self._done = self._total = 0
        self._start = self._last = 0.0
        self._name = ""

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        match event:
            case Note(_, message):
                stderr.print(f"[yellow]note[/yellow] {plain(message)}")
            case Started(num_tasks, nbytes, word):
                self._begin(num_tasks, nbytes, word)
            case Progress(name, nbytes):
                self._advance(name, nbytes)
            case ShardWritten(file, nbytes):
                self.close_line(f"wrote {file}, {size(nbytes)}")
            case _:
                self.close()

    def _begin(self, num_tasks: int, nbytes: int, word: str) -> None:
        self._total, self._start = nbytes, time.monotonic()
        self._last = self._start
        if self._tty:
            self._bar = tqdm(
                total=nbytes,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
                mininterval=0.1,
                file=sys.stderr,
            )
        else:
            stderr.print(f"{word} {num_tasks} tensors, {size(nbytes)}")

    def _advance(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        if name != self._name and self._verbose and not self._tty:
            stderr.print(f"  {plain(name)}")
        if self._bar is not None:
            if name != self._name:
                self._bar.set_postfix_str(printable(name[-48:]), refresh=False)
            self._bar.update(nbytes)
        elif time.monotonic() - self._last >= LOG_EVERY_SECONDS:
            self._last = time.monotonic()
            speed = self._done / (self._last - self._start)
            left = (self._total - self._done) / max(speed, 1)
            stderr.print(f"{self._done / max(1, self._total):.0%} {size(speed)}/s, {left:.0f} s left, at {plain(name)}")
        self._name = name

    def close_line(self, text: str) -> None:
        """A line above the bar, or in the log."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            stderr.print(plain(text))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
