"""How stored bytes become a weight: which tensors belong together, across shards, and in which layout."""

from quantconvert.sources.find import find_sources
from quantconvert.sources.model import Dropped, Source, Sources, View, Weight, bits_of, refs_of
from quantconvert.sources.stored import find_stored, specs_of

__all__ = [
    "Dropped", "Source", "Sources", "View", "Weight", "bits_of", "find_sources", "find_stored", "refs_of", "specs_of",
]  # fmt: skip
