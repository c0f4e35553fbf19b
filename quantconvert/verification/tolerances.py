"""How far what is stored of a weight may be from its source, whoever wrote it. Without torch."""

from __future__ import annotations

import math
from dataclasses import replace

from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS, Tolerance
from quantconvert.methods.base import Reach
from quantconvert.sources import Read

# The smallest numbers of the dtypes of scales: what would be less becomes that.
_SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}
# Other tools' weights: they round in other precisions, search and compensate, so that single values tell nothing. A
# weight of which half is noise is no weight: int4 has a tenth.
FOREIGN = Tolerance(relative=0.5, negative=True)


def tolerance_of(tensor: Read, origin: Read | None, method: str | None) -> Tolerance:
    """What the method that quantized a weight promises; None: it was another tool."""
    if method is None or tensor.stored is None:
        return FOREIGN
    stored = tensor.stored
    found = METHODS[method].tolerance(stored.scheme, *dtypes_of(tensor, origin))
    slack = LAYOUTS[stored.layout].slack(stored.scheme, tensor.dtype)
    if not slack or found.inside is None:
        return found
    outside = found.outside
    if isinstance(outside, Reach):
        outside = replace(outside, steps=outside.steps + slack)
    return replace(found, inside=found.inside + slack, outside=outside)


def dtypes_of(tensor: Read, origin: Read | None) -> tuple[str, str]:
    """That in which the scales of a weight were computed, and that in which they are stored."""
    return (origin or tensor).dtype, tensor.dtype


def tiny(dtypes: tuple[str, str]) -> float:
    """Below that a scale becomes 1, or is coarse."""
    return 2 * max(_SMALLEST.get(dtype, 0.0) for dtype in dtypes)


def relative_of(noise: float, signal: float) -> float:
    """The norm of the error over that of the weight, by their squares; infinite where there is only error."""
    return math.sqrt(noise / signal) if signal else math.inf if noise else 0.0
