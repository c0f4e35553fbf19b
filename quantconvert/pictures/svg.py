"""Pictures as SVG text, without a library: the map of layers and modules, a histogram, bars.

Colours are anchors of cividis (Nunez, Anderton, Renslow 2018), which the colour-blind read too; differences go from
blue (worse) by white to red (better). Figures stand in titles (tooltips) where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from quantconvert.pictures.facts import Row, Weight, rows_of, stacks_of
from quantconvert.text import one_line

CIVIDIS = ("00224e", "35456c", "666970", "948e77", "c8b866", "fee838")
DIVERGING = ("2166ac", "92c5de", "f7f7f7", "f4a582", "b2182b")
Value = Callable[[Row, int | None], float | None]
_CHAR, _LINE, _WIDTH = 6.3, 15, 720


def level(row: Row, layer: int | None) -> float | None:
    """A cell's own SQNR."""
    return row.cells[layer].sqnr


def colour(share: float, anchors: Sequence[str] = CIVIDIS) -> str:
    """`#rrggbb` at 0 to 1 between the anchors."""
    at = min(max(share, 0.0), 1.0) * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    ends = (bytes.fromhex(anchors[i]), bytes.fromhex(anchors[i + 1]))
    return "#" + bytes(round(a + (b - a) * (at - i)) for a, b in zip(*ends, strict=True)).hex()


def span(rows: Iterable[Row], value: Value = level) -> tuple[float, float]:
    """The least and the largest value, at least 1 dB apart."""
    found = [v for row in rows for layer in row.cells if (v := value(row, layer)) is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    return (low, high) if high - low >= 1 else ((low + high - 1) / 2, (low + high + 1) / 2)


def label_of(row: Row) -> str:
    """The module, fit for people."""
    return one_line(row.part)


def heat_map(
    rows: Sequence[Row],
    value: Value = level,
    anchors: Sequence[str] = CIVIDIS,
    titles: bool = True,
    ends: tuple[float, float] | None = None,
) -> str:
    """A map of modules (down) and layers (across), a stack under the other, with its legend.

    titles: a tooltip a cell. ends: of the scale; those of the values by default.
    """  # fmt: skip
    low, high = ends or span(rows, value)
    left = max((min(len(label_of(row)), 48) for row in rows), default=0) * _CHAR + 12
    body: list[str] = []
    top, right = 6.0, left + 240
    for stack, layers, members in stacks_of(rows):
        width = min(28, max(5, _WIDTH // max(1, len(layers))))
        body.append(_text(left, top + 10, one_line(stack) or "outside layers"))
        every = max(1, -(-24 // width))
        body += [
            _text(left + i * width, top + 10 + _LINE, str(k))
            for i, k in enumerate(layers)
            if k is not None and i % every == 0
        ]
        top += 2 * _LINE
        for row in members:
            label = label_of(row)
            body.append(_text(4, top + 11, label if len(label) <= 48 else label[:47] + "…"))
            body += _cells(row, layers, value, (left, top, width), (low, high), anchors, titles)
            top += _LINE
        right, top = max(right, left + len(layers) * width + 30), top + 8
    body.append(_legend(left, top, (low, high), anchors))
    return _svg(right, top + 34, body)


def _cells(
    row: Row, layers: Sequence[int | None], value: Value, at: tuple[float, float, int], ends: tuple[float, float],
    anchors: Sequence[str], titles: bool,
) -> list[str]:  # fmt: skip
    (left, top, width), (low, high) = at, ends
    found = []
    for i, layer in enumerate(layers):
        if layer not in row.cells:
            continue
        figure = value(row, layer)
        fill = "none" if figure is None else colour((figure - low) / (high - low), anchors)
        shape = f'<path fill="{fill}" d="M{left + i * width:g} {top:g}h{width - 1}v{_LINE - 1}h-{width - 1}z"'
        said = "no noise" if figure is None else f"{figure:.1f} dB"
        count = row.cells[layer].count
        many = f", {count} weights" if count > 1 else ""
        title = f"><title>{'' if layer is None else layer} {said}{many}</title></path>"
        found.append(shape + (title if titles else "/>"))
    return found


def _legend(left: float, top: float, ends: tuple[float, float], anchors: Sequence[str]) -> str:
    low, high = ends
    steps = "".join(
        f'<path fill="{colour(i / 23, anchors)}" d="M{left + i * 5:g} {top + 6:g}h5v10h-5z"/>' for i in range(24)
    )
    return steps + _text(left, top + 28, f"{low:.1f} dB") + _text(left + 90, top + 28, f"{high:.1f} dB")


def bars(rows: Sequence[tuple[str, float, str]], width: int = 420) -> str:
    """Labelled bars, one below the other: label, length, figure."""
    left = max((min(len(label), 40) for label, _, _ in rows), default=0) * _CHAR + 12
    longest = max((length for _, length, _ in rows), default=0) or 1
    body = []
    for i, (label, length, figure) in enumerate(rows):
        top, long = i * _LINE, width * length / longest
        body.append(_text(4, top + 11, one_line(label)[:40]))
        body.append(f'<path fill="#5b7fb5" d="M{left:g} {top + 1:g}h{long:.1f}v12h-{long:.1f}z"/>')
        body.append(_text(left + long + 6, top + 11, figure))
    return _svg(left + width + 120, len(rows) * _LINE + 4, body)


def picture(weights: Iterable[Weight]) -> str:
    """The map alone, as a file: on white, so that it can be read on any page."""
    text = heat_map(rows_of(weights), titles=False)
    head, _, rest = text.partition(">")
    style = "<style>text{font:11px system-ui,sans-serif;fill:#222}</style>"
    return f'{head}>{style}<path fill="#fff" d="M0 0h9999v9999h-9999z"/>{rest}\n'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _svg(width: float, height: float, body: Iterable[str]) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(body)}</svg>'
