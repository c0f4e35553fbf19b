"""The map in figures: for terminals, and as Markdown for the summary of a CI step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from quantconvert.pictures.facts import Cell, Facts, Row, Stack, stacks_of
from quantconvert.pictures.svg import label_of
from quantconvert.text import clean, counted, one_line, size


class Band(NamedTuple):
    """A module's figures over groups of layers: dB, or None where there is nothing."""

    label: str
    values: tuple[float | None, ...]


class Map(NamedTuple):
    """A stack's map: headings of its groups of layers, and a band a module."""

    stack: str
    groups: tuple[str, ...]
    bands: tuple[Band, ...]


def maps(facts: Facts, columns: int) -> list[Map]:
    """At most `columns` groups of neighbouring layers a stack, their sums added up."""
    return [_map(stack, max(1, columns)) for stack in stacks_of(facts.rows)]


def _map(stack: Stack, columns: int) -> Map:
    name, layers, rows = stack
    each = -(-len(layers) // columns)
    groups = [layers[i : i + each] for i in range(0, len(layers), each)]
    bands = tuple(Band(label_of(row), tuple(_sum(row, group) for group in groups)) for row in rows)
    return Map(one_line(name), tuple(map(_heading, groups)), bands)


def _heading(group: Sequence[int | None]) -> str:
    first, last = group[0], group[-1]
    return "" if first is None else str(first) if first == last else f"{first}-{last}"


def _sum(row: Row, group: Sequence[int | None]) -> float | None:
    total = Cell()
    for layer in group:
        if layer in row.cells:
            total.add(row.cells[layer].noise, row.cells[layer].signal)
    return total.sqnr


def totals(facts: Facts) -> list[tuple[str, str]]:
    """Sizes, bits and quality, in words."""
    saved = facts.nbytes / max(1, facts.source_nbytes)
    rows = [
        ("size", f"{size(facts.source_nbytes)} -> {size(facts.nbytes)} ({saved:.1%})"),
        ("bits per weight", f"{facts.bits_per_weight:.3f} in quantized layers"),
        ("schemes", ", ".join(f"{scheme} ({count} weights)" for scheme, count in facts.schemes.items()) or "none"),
    ]
    if facts.sqnr is not None and facts.median_sqnr is not None:
        worst = facts.worst[0]
        rows.append(("SQNR", f"{facts.sqnr:.1f} dB of all weights, median {facts.median_sqnr:.1f}, worst "
                             f"{worst.sqnr:.1f} ({clean(worst.name)})"))  # fmt: skip
    for i, (reason, why, count, nbytes, _) in enumerate(facts.reasons):
        rows.append(("kept" if i == 0 else "", f"{reason}: {counted(count, 'tensor')}, {size(nbytes)}: {why}"))
    return rows


def markdown(facts: Facts, columns: int = 12) -> str:
    """Totals, the map and the worst weights as tables."""
    parts = [_table(("", ""), totals(facts))]
    for found in maps(facts, columns):
        rows = [(band.label, *(_figure(value) for value in band.values)) for band in found.bands]
        parts.append(_table((f"SQNR, dB: {found.stack or 'outside layers'}", *found.groups), rows))
    if facts.worst:
        worst = [(w.name, w.scheme, f"{w.sqnr:.2f}") for w in facts.worst[:10]]
        parts.append(_table(("worst weights", "scheme", "SQNR, dB"), worst))
    return "\n".join(parts)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text of strangers inside a table: no markup, no end of the cell."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", text)
