"""The numbers behind the pictures: sums over a result's weights, from what its quantconvert.json says of each.

Noise and signal are sums of squares, so that those of a layer, or of all its experts, are added up before they become
decibels; the mean of decibels would be another number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, isfinite, log10
from typing import Any, NamedTuple

from quantconvert.families import REASON_TEXT
from quantconvert.patterns import WEIGHT_SUFFIX

NUM_WORST = 20
_MAX_BINS = 40
_KEPT = ("reason", "why", "count", "nbytes", "names")


def decibels(noise: float, signal: float) -> float | None:
    """Signal to noise; None without either."""
    return 10 * (log10(signal) - log10(noise)) if noise > 0 and signal > 0 else None


class Place(NamedTuple):
    """Where a module stands: in which stack of layers, in which of them (None outside), as what, as which expert."""

    stack: str
    layer: int | None
    part: str
    expert: int | None = None

    @classmethod
    def of(cls, name: str) -> Place:
        """By its name: `model.layers.3.mlp.experts.7.up_proj.weight` is (model.layers, 3, mlp.experts.*.up_proj, 7)."""
        words = name.removesuffix(WEIGHT_SUFFIX).split(".")
        numbers = [i for i, word in enumerate(words) if word.isascii() and word.isdecimal() and len(word) < 10]
        if not numbers or numbers[0] == len(words) - 1:
            return cls("", None, ".".join(words))
        first, rest = numbers[0], words[numbers[0] + 1 :]
        expert = next((i - first - 1 for i in numbers[1:] if "expert" in words[i - 1]), None)
        index = None if expert is None else int(rest[expert])
        part = ".".join("*" if i == expert else word for i, word in enumerate(rest))
        return cls(".".join(words[:first]), int(words[first]), part, index)


class Weight(NamedTuple):
    """A quantized weight: bytes before and after, sums of squares of its error and of itself (None: not measured)."""

    name: str
    scheme: str
    role: str
    num_elements: int
    source_nbytes: int
    nbytes: int
    noise: float | None
    signal: float | None

    @property
    def sqnr(self) -> float | None:
        """In dB."""
        return None if self.noise is None or self.signal is None else decibels(self.noise, self.signal)


class Kept(NamedTuple):
    """A tensor in high precision, and why."""

    name: str
    reason: str
    role: str
    source_nbytes: int
    nbytes: int


@dataclass(slots=True)
class Cell:
    """All weights of one kind in one layer."""

    noise: float = 0.0
    signal: float = 0.0
    count: int = 0

    def add(self, noise: float, signal: float) -> None:
        self.noise, self.signal, self.count = self.noise + noise, self.signal + signal, self.count + 1

    @property
    def sqnr(self) -> float | None:
        """In dB, of the sums."""
        return decibels(self.noise, self.signal)


class Row(NamedTuple):
    """A kind of module through the layers of its stack."""

    stack: str
    part: str
    cells: Mapping[int | None, Cell]


class Stack(NamedTuple):
    """A stack of layers: which there are (first None: outside), and the rows of its map."""

    name: str
    layers: tuple[int | None, ...]
    rows: tuple[Row, ...]


class Size(NamedTuple):
    """Tensors of one role."""

    role: str
    num_tensors: int
    source_nbytes: int
    nbytes: int


@dataclass(frozen=True)
class Facts:
    """What a conversion did, as its quantconvert.json says it. `made`: the rest of that file, without the tensors."""

    location: str
    weights: tuple[Weight, ...]
    kept: tuple[Kept, ...]
    source_nbytes: int
    nbytes: int
    made: Mapping[str, Any]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The map: stacks and modules in the order of the source."""
        return rows_of(self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the result's quantized layers, scales and zero points included."""
        return 8 * sum(w.nbytes for w in self.weights) / max(1, sum(w.num_elements for w in self.weights))

    @cached_property
    def measured(self) -> tuple[Weight, ...]:
        """Weights with noise, the worst first."""
        return tuple(sorted((w for w in self.weights if w.sqnr is not None), key=lambda w: (w.sqnr, w.name)))

    @property
    def worst(self) -> tuple[Weight, ...]:
        return self.measured[:NUM_WORST]

    @property
    def median_sqnr(self) -> float | None:
        from statistics import median  # decimals and fractions with it, which conversions do not need

        values = [w.sqnr for w in self.measured if w.sqnr is not None]
        return median(values) if values else None

    @property
    def sqnr(self) -> float | None:
        """Of all weights together."""
        return decibels(sum(w.noise or 0.0 for w in self.measured), sum(w.signal or 0.0 for w in self.measured))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Bytes by role, the largest first."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        tensors: list[Weight | Kept] = [*self.weights, *self.kept]
        for tensor in tensors:
            for i, value in enumerate((1, tensor.source_nbytes, tensor.nbytes)):
                found[tensor.role][i] += value
        return tuple(sorted((Size(role, *sums) for role, sums in found.items()), key=lambda s: (-s.nbytes, s.role)))

    @property
    def schemes(self) -> dict[str, int]:
        return dict(Counter(w.scheme for w in self.weights))

    @property
    def reasons(self) -> tuple[tuple[str, str, int, int, str], ...]:
        """Of what stays: reason, its words, how many tensors, bytes, and the names of a few."""
        found: dict[str, list[Kept]] = defaultdict(list)
        for tensor in self.kept:
            found[tensor.reason].append(tensor)
        rows = []
        for reason, kept in sorted(found.items(), key=lambda item: (-sum(k.nbytes for k in item[1]), item[0])):
            names = ", ".join(k.name for k in kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
            rows.append((reason, REASON_TEXT.get(reason, reason), len(kept), sum(k.nbytes for k in kept), names))
        return tuple(rows)

    @property
    def histogram(self) -> tuple[tuple[float, float, int], ...]:
        """How many weights have an SQNR from so many dB to so many; bins without gaps, of whole dB."""
        return histogram([w.sqnr for w in self.measured if w.sqnr is not None])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; dB with two decimals."""
        return {
            "location": self.location,
            "source_nbytes": self.source_nbytes,
            "nbytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "sqnr": rounded(self.sqnr),
            "median_sqnr": rounded(self.median_sqnr),
            "roles": [size._asdict() for size in self.sizes],
            "schemes": self.schemes,
            "map": [
                {"stack": row.stack, "part": row.part,
                 "layers": {"" if layer is None else str(layer): rounded(c.sqnr) for layer, c in row.cells.items()}}
                for row in self.rows
            ],
            "histogram": [list(part) for part in self.histogram],
            "worst": [{"name": w.name, "scheme": w.scheme, "sqnr": rounded(w.sqnr)} for w in self.worst],
            "kept": [dict(zip(_KEPT, row, strict=True)) for row in self.reasons],
            "made": dict(self.made),
        }  # fmt: skip


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def rows_of(weights: Iterable[Weight]) -> tuple[Row, ...]:
    """The map of weights with noise; all experts of a layer are one cell."""
    found: dict[tuple[str, str], dict[int | None, Cell]] = {}
    for weight in weights:
        if weight.noise is not None and weight.signal is not None:
            place = Place.of(weight.name)
            cells = found.setdefault((place.stack, place.part), {})
            cells.setdefault(place.layer, Cell()).add(weight.noise, weight.signal)
    order = {stack: i for i, stack in reversed(list(enumerate(dict.fromkeys(stack for stack, _ in found))))}
    rows = (Row(stack, part, cells) for (stack, part), cells in found.items())
    return tuple(sorted(rows, key=lambda row: (order[row.stack], row.part)))


def stacks_of(rows: Iterable[Row]) -> list[Stack]:
    """The map, stack by stack."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.stack, []).append(row)
    return [
        Stack(name, tuple(sorted({k for row in members for k in row.cells}, key=lambda k: -1 if k is None else k)),
              tuple(members))
        for name, members in found.items()
    ]  # fmt: skip


def histogram(values: list[float]) -> tuple[tuple[float, float, int], ...]:
    """Counts by bins of the least whole width that needs no more than `_MAX_BINS`."""
    if not values:
        return ()
    low, high = floor(min(values)), floor(max(values)) + 1
    step = max(1, ceil((high - low) / _MAX_BINS))
    counts = Counter(int((value - low) // step) for value in values)
    return tuple((low + i * step, low + (i + 1) * step, counts[i]) for i in range(ceil((high - low) / step)))


def weights_of(tensors: Mapping[str, Mapping[str, Any]]) -> tuple[Weight, ...]:
    """The entries `tensors` of a quantconvert.json. Raises `ValueError`, `TypeError` or `KeyError`: it is none."""
    return tuple(_weight(str(name), entry) for name, entry in tensors.items())


def _weight(name: str, entry: Mapping[str, Any]) -> Weight:
    num_elements, before, after = _whole(entry, "num_elements", "source_nbytes", "nbytes")
    sums = _number(entry, "noise"), _number(entry, "signal")
    return Weight(name, str(entry["scheme"]), str(entry["role"]), num_elements, before, after, *sums)


def facts_of(value: Mapping[str, Any], location: str) -> Facts:
    """What a quantconvert.json says. Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError`: it is none."""
    kept = tuple(
        Kept(str(name), str(entry["reason"]), str(entry["role"]), *_whole(entry, "source_nbytes", "nbytes"))
        for name, entry in value["kept"].items()
    )
    before, after = _whole(value["size"], "source_nbytes", "nbytes")
    made = {k: v for k, v in value.items() if k not in ("tensors", "kept", "files", "factors", "changed", "size")}
    return Facts(location, weights_of(value["tensors"]), kept, before, after, made)


def difference(one: Facts, other: Facts) -> tuple[Row, ...]:
    """The map of what is louder in one than in other is `delta` of these rows: cells of `one` where both have any."""
    theirs = {(row.stack, row.part): row.cells for row in other.rows}
    found = []
    for row in one.rows:
        cells = {k: c for k, c in row.cells.items() if k in theirs.get((row.stack, row.part), {})}
        if cells:
            found.append(Row(row.stack, row.part, cells))
    return tuple(found)


def delta(other: Facts) -> Callable[[Row, int | None], float | None]:
    """By how many dB a cell is better than that of `other`; None where either has no noise."""
    theirs = {(row.stack, row.part): row.cells for row in other.rows}

    def better(row: Row, layer: int | None) -> float | None:
        mine, old = row.cells[layer].sqnr, theirs[row.stack, row.part][layer].sqnr
        return None if mine is None or old is None else mine - old

    return better


def moved(one: Facts, other: Facts) -> list[tuple[str, float, float]]:
    """Weights of both whose SQNR differs most: name, dB in `one`, dB in `other`."""
    old = {w.name: w.sqnr for w in other.measured}
    both = [(w.name, w.sqnr, old[w.name]) for w in one.measured if w.sqnr is not None and w.name in old]
    found = [(name, mine, theirs) for name, mine, theirs in both if theirs is not None]
    return sorted(found, key=lambda item: (-abs(item[1] - item[2]), item[0]))[:NUM_WORST]


def _whole(entry: Mapping[str, Any], *keys: str) -> list[int]:
    values = [entry[key] for key in keys]
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError("sizes are no whole numbers")
    return values


def _number(entry: Mapping[str, Any], key: str) -> float | None:
    if key not in entry:
        return None
    value = float(entry[key])
    if not isfinite(value) or value < 0:
        raise ValueError(f"{key} is no sum of squares")
    return value
