"""Progress: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from quantconvert.cli.lines import Style, stderr
from quantconvert.events import Event, Note, Progress, ShardWritten, Started
from quantconvert.patterns import layer_of
from quantconvert.text import counted, printable, size

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY_SECONDS = 10.0
# Below this width the bar would be nothing beside a tensor's name.
NAMES_FROM_COLUMNS, NAME_WIDTH = 100, 40
BAR = "{percentage:3.0f}% |{bar}| {rate_fmt}, {remaining} left{postfix}"


class ProgressReporter:
    """A `Reporter` for stderr: on a terminal a bar with speed, time left and layers, else a line every ten seconds."""

    def __init__(self, *, verbose: bool = False) -> None:
        self._tty = sys.stderr.isatty()
        self._verbose = verbose
        self._bar: tqdm[None] | None = None
        self._done = self._total = self._num_layers = 0
        self._start: float | None = None
        self._last = 0.0
        self._name = ""
        self._layers: set[str] = set()

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        match event:
            case Note(_, message):
                self.close_line(message, label="note", style="yellow")
            case Started(num_tasks, nbytes, word, num_layers):
                self.close()
                self._start, self._done, self._total = None, 0, nbytes
                self._num_layers, self._layers = num_layers, set()
                stderr.print(f"{word} {counted(num_tasks, 'tensor')}, {size(nbytes)}")
            case Progress(name, nbytes):
                self._advance(name, nbytes)
            case ShardWritten(file, nbytes):
                self.close_line(f"wrote {file}, {size(nbytes)}")
            case _:
                self.close()

    def _begin(self) -> float:
        """The clock and the bar start with the first bytes: before them torch is imported."""
        self._last = time.monotonic()
        if self._tty:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
                mininterval=0.1,
                bar_format=BAR,
                file=sys.stderr,
            )
        return self._last

    def _advance(self, name: str, nbytes: int) -> None:
        is_first = self._start is None
        if self._start is None:
            self._start = self._begin()
        self._done += nbytes
        if is_first or name != self._name:
            self._name = name
            self._layers |= {layer_of(name) or ""}
            if self._verbose and not self._tty:
                stderr.print(f"  {name}")
            if self._bar is not None:
                self._bar.set_postfix_str(self._tail(), refresh=is_first)
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._last >= LOG_EVERY_SECONDS:
            self._last = time.monotonic()
            speed = self._done / (self._last - self._start)
            left = (self._total - self._done) / max(speed, 1)
            stderr.print(f"{self._done / max(1, self._total):.0%} {size(speed)}/s, {left:.0f} s left, at {name}")

    def _tail(self) -> str:
        """`layers  6/16`, and on a wide terminal the tensor; always as wide, so that the bar does not jump."""
        parts = []
        if self._num_layers:
            total = str(self._num_layers)
            parts.append(f"layers {len(self._layers - {''}):>{len(total)}}/{total}")
        if stderr.width >= NAMES_FROM_COLUMNS:
            parts.append(printable(self._name[-NAME_WIDTH:], newlines=False)[-NAME_WIDTH:].ljust(NAME_WIDTH))
        return ", ".join(parts)

    def close_line(self, text: str, *, label: str = "", style: Style = "bold") -> None:
        """A line above the bar, or in the log."""
        if self._bar is not None:
            self._bar.clear()
        stderr.print(text, label=label, style=style)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
