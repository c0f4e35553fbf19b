"""Factors that move between what gives a vector and what reads it: which, where they are kept, how they are found."""

from quantconvert.factors.file import (
    FACTORS,
    IMPORTANCES,
    STATISTICS,
    VectorFile,
    beside,
    place_vectors,
    read_places,
)
from quantconvert.factors.wanted import Driver, Factors, Recipe, Wanted

__all__ = [
    "FACTORS", "IMPORTANCES", "STATISTICS", "Driver", "Factors", "Recipe", "VectorFile", "Wanted", "beside",
    "place_vectors", "read_places",
]  # fmt: skip
