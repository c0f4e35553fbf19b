"""How stored bytes become a weight: which tensors belong together, across shards, and in which layout."""

from quantconvert.sources.stored import find_stored

__all__ = ["find_stored"]
