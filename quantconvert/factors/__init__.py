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
from quantconvert.factors.summary import Summary, summarize
from quantconvert.factors.walk import Walk, bag_file, find_walk
from quantconvert.factors.wanted import Driver, Factors, Recipe, Wanted

__all__ = [
    "FACTORS", "IMPORTANCES", "STATISTICS", "Driver", "Factors", "Recipe", "Summary", "VectorFile", "Walk", "Wanted",
    "bag_file", "beside", "find_walk", "place_vectors", "read_places", "summarize",
]  # fmt: skip
