"""What `--target-bits` has spent, as values for a plan; `quantconvert.planning.budget` spends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantconvert.rules import Rule
from quantconvert.text import counted

POINTS = 8  # of the curve that are printed


@dataclass(frozen=True, slots=True)
class Point:
    """Bits a quantized weight, and the weighted noise that is left, as a share of that with nothing raised."""

    bits: float
    noise: float


@dataclass(frozen=True, slots=True)
class Budget:
    """What was spent. num_raised of num_sets are under `rule`; curve: one set more a point, from nothing to all."""

    target: float
    spent: Point
    num_raised: int
    num_sets: int
    rule: str
    rules: tuple[Rule, ...]
    curve: tuple[Point, ...]

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        step = max(1, -(-(len(self.curve) - 1) // (POINTS - 1)))
        shown = [*self.curve[:-1:step], self.curve[-1]]
        what = f"{self.num_raised} of {counted(self.num_sets, 'set')} of layers raised to {self.rule}"
        return [
            ("budget", f"{self.target:g} bits a quantized weight asked for, {self.spent.bits:.3f} spent: {what}"),
            ("  noise left", f"{self.spent.noise:.1%} (of the weights, data-free: no measure of quality)"),
            ("  curve", ", ".join(f"{point.bits:.2f} bits {point.noise:.0%}" for point in shown)),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "target_bits": self.target,
            "bits": round(self.spent.bits, 4),
            "noise": round(self.spent.noise, 4),
            "num_raised": self.num_raised,
            "num_sets": self.num_sets,
            "rules": [str(rule) for rule in self.rules],
            "curve": [[round(point.bits, 4), round(point.noise, 4)] for point in self.curve],
        }
