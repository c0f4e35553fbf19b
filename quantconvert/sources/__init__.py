"""How stored bytes become a weight: which tensors belong together, across shards, and in which layout."""

from quantconvert.sources.codes import find_stored, specs_of
from quantconvert.sources.find import find_sources
from quantconvert.sources.read import Dropped, Source, Sources, View, Weight, bits_of, refs_of

__all__ = [
    "Dropped", "Source", "Sources", "View", "Weight", "bits_of", "find_sources", "find_stored", "refs_of", "specs_of",
]  # fmt: skip
