"""The registry of methods: weight to codes. A new one is a file and a line here."""

from __future__ import annotations

from quantconvert.methods.base import Inputs, Method, Needs, Noise, NonFinite, ScaleOverflow, Tolerance
from quantconvert.methods.rtn import Rtn
from quantconvert.registry import Registry

__all__ = [
    "DEFAULT_METHOD", "METHODS", "Inputs", "Method", "Needs", "Noise", "NonFinite", "ScaleOverflow", "Tolerance",
]  # fmt: skip

DEFAULT_METHOD = "rtn"
METHODS: Registry[Method] = Registry("method", Rtn())
