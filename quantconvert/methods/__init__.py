"""The registry of methods: weight to codes. A new one is a file and a line here."""

from __future__ import annotations

from quantconvert.methods.base import (
    BadInputs,
    Inputs,
    Method,
    Needs,
    Noise,
    NonFinite,
    Reach,
    ScaleOverflow,
    Tolerance,
)
from quantconvert.methods.four_over_six import FourOverSix
from quantconvert.methods.full_range import FullRange
from quantconvert.methods.gptq import Gptq
from quantconvert.methods.rtn import Rtn
from quantconvert.methods.search import Search
from quantconvert.registry import Registry

__all__ = [
    "DEFAULT_METHOD", "METHODS", "BadInputs", "FourOverSix", "FullRange", "Inputs", "Method", "Needs", "Noise",
    "NonFinite", "Reach", "ScaleOverflow", "Tolerance",
]  # fmt: skip

DEFAULT_METHOD = "rtn"
METHODS: Registry[Method] = Registry("method", Rtn(), Search(), Gptq(), FourOverSix(), FullRange())
