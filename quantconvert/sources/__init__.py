"""How stored bytes become a weight: which tensors belong together, in which encoding, and by which steps.

A new kind of input is a file with an `Encoding` and a line in `sources/registry.py`; a new step a file in `steps/`.
"""

from quantconvert.sources.find import find_sources, known_methods
from quantconvert.sources.read import Cost, Dropped, Read, Sources, View, as_stored
from quantconvert.sources.registry import ENCODINGS, cost_of, form_of, open_rows, scratch_nbytes

__all__ = [
    "ENCODINGS", "Cost", "Dropped", "Read", "Sources", "View", "as_stored", "cost_of", "find_sources", "form_of",
    "known_methods", "open_rows", "scratch_nbytes",
]  # fmt: skip
