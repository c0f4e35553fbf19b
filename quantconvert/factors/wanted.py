"""What the first pass of a conversion has to find, as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quantconvert.checkpoint import TensorRef
from quantconvert.factors.file import VectorFile
from quantconvert.sources import Read
from quantconvert.sources.sites import Site
from quantconvert.text import counted


class Driver(NamedTuple):
    """A weight whose columns decide the factors, and the columns of a group as it will be quantized; None: a row."""

    read: Read
    group_size: int | None


# weights: `recipe.equalize`. combined: with importances, half of each. smooth: SmoothQuant's.
Recipe = Literal["weights", "combined", "smooth"]


class Wanted(NamedTuple):
    """The factors of one site. place: where they are kept. exact: powers of two alone, which any float takes exactly:
    what gives the vector is a matrix that stays in high precision. importances: of the inputs of the drivers, E[x_j^2],
    or, for `smooth`, maxima: max |x_j| of each, where these are known.
    """

    site: Site
    drivers: tuple[Driver, ...]
    place: TensorRef
    exact: bool = False
    recipe: Recipe = "weights"
    importances: tuple[TensorRef, ...] = ()
    maxima: tuple[TensorRef, ...] = ()
    alpha: float = 0.0


@dataclass(frozen=True, slots=True)
class Factors:
    """All factors of a conversion, and the file that keeps them."""

    wanted: tuple[Wanted, ...]
    file: VectorFile

    def __str__(self) -> str:
        recipes = Counter(wanted.recipe for wanted in self.wanted)
        return ", ".join(f"{counted(count, 'vector')} {_WORDS[recipe]}" for recipe, count in recipes.items())

    @property
    def read_nbytes(self) -> int:
        """Bytes that finding them reads, about: a sample of rows of each weight, twice; for maxima all, once."""
        return sum(driver.read.nbytes * rows // max(1, driver.read.matrix[0])
                   * (1 if wanted.recipe == "smooth" else PASSES)
                   for wanted in self.wanted for driver, rows in sampled_rows(wanted))  # fmt: skip


_WORDS: dict[Recipe, str] = {
    "weights": "by what the weights say",
    "combined": "by what the weights and importances of inputs say",
    "smooth": "by SmoothQuant",
}

# Rows of all drivers of a site that are looked at, and how often. 1,024 give the same factors as all, within
# noise, and of one weight nearly (a per cent) the same error of rounding.
SAMPLED_ROWS, PASSES = 1024, 2


def sampled_rows(wanted: Wanted) -> Sequence[tuple[Driver, int]]:
    """How many rows of each driver are looked at: its share of `SAMPLED_ROWS`, at least one; all where maxima count."""
    rows = [driver.read.matrix[0] for driver in wanted.drivers]
    if wanted.recipe != "smooth":
        total = sum(rows)
        rows = [max(1, min(own, -(-SAMPLED_ROWS * own // total))) for own in rows]
    return tuple(zip(wanted.drivers, rows, strict=True))
