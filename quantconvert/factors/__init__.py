"""Factors that move between what gives a vector and what reads it: which, where they are kept, how they are found."""

from quantconvert.factors.file import FACTORS, FactorFile, place_factors, read_places
from quantconvert.factors.wanted import Driver, Factors, Wanted

__all__ = ["FACTORS", "Driver", "FactorFile", "Factors", "Wanted", "place_factors", "read_places"]
