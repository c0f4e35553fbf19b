"""Tables on stdout, by rich: imported where one is printed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantconvert.cli.lines import LOG_WIDTH, stdout
from quantconvert.text import clean


def print_table(names: Sequence[str], rows: Iterable[Sequence[str]], first_width: int | None = None) -> None:
    """Columns under their names, folded where a terminal is too narrow; cells pass `clean`.

    first_width: the least columns that the first one gets.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    table.columns[0].min_width = first_width
    for row in rows:
        table.add_row(*(escape(clean(cell)) for cell in row))
    console().print(table)


def console() -> Console:
    """Plain where there is no terminal or NO_COLOR is set; text of ours is never taken for emoji or numbers."""
    return Console(
        soft_wrap=True,
        highlight=False,
        emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if stdout.stream.isatty() else LOG_WIDTH,
    )
