"""Factors in a few numbers: the smallest and the largest, layer by layer."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantconvert.factors.file import FACTORS
from quantconvert.factors.wanted import Factors
from quantconvert.patterns import layer_of, template_of


@dataclass(frozen=True, slots=True)
class Summary:
    """What was scaled: how many vectors, and the smallest and largest factor by layer and by what gives the vector."""

    num_vectors: int
    layers: Mapping[str, Mapping[str, tuple[float, float]]]

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest of all."""
        pairs = [pair for givers in self.layers.values() for pair in givers.values()]
        return min(low for low, _ in pairs), max(high for _, high in pairs)

    def __str__(self) -> str:
        low, high = self.range
        return f"{self.num_vectors} vectors in {len(self.layers)} layers, by {low:.3g} to {high:.3g}"

    def to_json(self) -> dict[str, Any]:
        """By layer: what gives a vector (`N` is any expert), and the two factors."""
        return {layer: {name: list(pair) for name, pair in givers.items()} for layer, givers in self.layers.items()}


def summarize(folder: Path, factors: Factors) -> Summary:
    """Of the file that the first pass has left in `folder`."""
    layers: dict[str, dict[str, tuple[float, float]]] = {}
    with open(folder / FACTORS, "rb") as file:
        for ref in (wanted.place for wanted in factors.wanted):
            file.seek(ref.offset)
            values = array("f", file.read(ref.nbytes))
            layer = layer_of(ref.name) or ""
            givers = layers.setdefault(layer.rstrip("."), {})
            giver = template_of(ref.name[len(layer) :])
            low, high = givers.get(giver, (float("inf"), 0.0))
            givers[giver] = min(low, _short(min(values))), max(high, _short(max(values)))
    return Summary(len(factors.wanted), layers)


def _short(value: float) -> float:
    return float(f"{value:.6g}")
