"""Factors that move between what gives a vector and what reads it: which, where they are kept, how they are found."""

from quantconvert.factors.file import FACTORS, FactorFile, place_factors, read_places
from quantconvert.factors.summary import Summary, summarize
from quantconvert.factors.walk import Walk, find_walk
from quantconvert.factors.wanted import Driver, Factors, Wanted

__all__ = [
    "FACTORS", "Driver", "FactorFile", "Factors", "Summary", "Walk", "Wanted", "find_walk", "place_factors",
    "read_places", "summarize",
]  # fmt: skip
