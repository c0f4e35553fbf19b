"""A report in the terminal: totals, and the map of layers and modules as figures, coloured where colours are shown."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from quantconvert.cli.lines import stdout
from quantconvert.cli.output import print_facts
from quantconvert.cli.tables import console
from quantconvert.pictures.facts import Facts
from quantconvert.pictures.svg import colour, span
from quantconvert.pictures.words import Map, maps, totals

_LABEL, _CELL = 34, 6


def print_report(facts: Facts, written: list[str]) -> None:
    """On stdout. written: files that were made."""
    print_facts(stdout, totals(facts) + [("wrote", name) for name in written])
    screen, ends = console(), span(facts.rows)
    for found in maps(facts, max(1, (screen.width - _LABEL) // _CELL)):
        screen.print()
        for line in _lines(found, ends):
            screen.print(line, crop=True, no_wrap=True)


def _lines(found: Map, ends: tuple[float, float]) -> list[Text]:
    heading = f"SQNR, dB: {found.stack or 'outside layers'}"
    lines = [Text(f"{heading[: _LABEL - 1]:<{_LABEL}}" + "".join(f"{group:>{_CELL - 1}} " for group in found.groups))]
    for band in found.bands:
        label = band.label if len(band.label) < _LABEL else f"…{band.label[2 - _LABEL :]}"
        line = Text(f"{label:<{_LABEL}}")
        for value in band.values:
            line.append(" " * 5 if value is None else f"{value:5.1f}", _style(value, ends)).append(" ")
        lines.append(line)
    return lines


def _style(value: float | None, ends: tuple[float, float]) -> Style:
    if value is None:
        return Style()
    share = (value - ends[0]) / (ends[1] - ends[0])
    return Style(color="#000000" if share > 0.5 else "#ffffff", bgcolor=colour(share))
