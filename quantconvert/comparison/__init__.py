"""Does it still speak? A result in an engine, beside its source."""

from quantconvert.comparison.outcome import Comparison
from quantconvert.comparison.run import Request, check

__all__ = ["Comparison", "Request", "check"]
