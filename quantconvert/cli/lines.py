"""Lines on stdout and stderr: what is styled on a terminal is plain everywhere else.

Tables, which fold to the width of a terminal, are rich's (`cli/tables.py`).
"""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

from quantconvert.text import clean, escaped_json, redacted

LOG_WIDTH = 160  # where there is no terminal to ask
Style = Literal["bold", "red", "green", "yellow"]
_CODES: dict[Style, int] = {"bold": 1, "red": 31, "green": 32, "yellow": 33}


class Lines:
    """One of the process's two streams, whichever object that is at the time; all text passes `clean`."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self.name = name

    @property
    def stream(self) -> TextIO:
        found: TextIO = getattr(sys, self.name)
        return found

    @property
    def is_terminal(self) -> bool:
        """Whether people see it at once; FORCE_COLOR says so of what only seems to be a file."""
        return bool(os.environ.get("FORCE_COLOR")) or self.stream.isatty()

    @property
    def width(self) -> int:
        """Columns: COLUMNS, or what the terminal says; 80 where neither does, `LOG_WIDTH` where there is none."""
        if not self.is_terminal:
            return LOG_WIDTH
        told = os.environ.get("COLUMNS", "")
        try:
            return int(told) if told.isdigit() else os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def styled(self, style: Style, text: str) -> str:
        """`text`, cleaned, as a terminal shows it in that style; without one, and with NO_COLOR, as it is."""
        text = clean(text)
        # Windows' consoles show the codes themselves unless they are told not to
        dull = os.environ.get("TERM", "") in ("dumb", "unknown") or os.name == "nt"
        if dull or os.environ.get("NO_COLOR") or not self.is_terminal:
            return text
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m"

    def print(self, text: str = "", *, label: str = "", style: Style = "bold") -> None:
        """A line of its own, or several; label: what stands before it in a style."""
        begin = self.styled(style, label) + " " * bool(label and text) if label else ""
        self.stream.write(f"{begin}{clean(text)}\n")


stdout, stderr = Lines("stdout"), Lines("stderr")


def print_json(value: object) -> None:
    """Data for programs, plain whatever the terminal."""
    import json

    print_text(redacted(escaped_json(json.dumps(value, indent=2, ensure_ascii=False))) + "\n")


def print_text(text: str) -> None:
    """Data as it is."""
    sys.stdout.write(text)


def flush_stdout() -> None:
    """Write what is still to be written, while an error can still be reported."""
    sys.stdout.flush()
