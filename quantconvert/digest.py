"""One digest for any value of ours: everything in it counts, nothing is listed by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache


@lru_cache(maxsize=256)
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def canonical(value: object) -> object:
    """A value as JSON: dataclasses by the name of their class and all their fields, mappings with sorted keys.

    Raises `TypeError` for what is neither plain nor made of such values: an object whose state could hide.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(canonical(getattr(value, name)) for name in _names(type(value)))]
    if isinstance(value, (tuple, list)):
        return [canonical(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in sorted(value.items())}
    raise TypeError(f"{type(value).__name__} cannot be hashed by its content")


def digest(value: object) -> str:
    """Hexadecimal sha256 of a value's canonical JSON; of a sequence one item after the other is in memory."""
    hasher = hashlib.sha256()
    for part in _parts(value):
        hasher.update(part.encode())
    return hasher.hexdigest()


def _parts(value: object) -> Iterator[str]:
    """The canonical JSON of a value in pieces."""
    encode = json.JSONEncoder(sort_keys=True).encode
    if not isinstance(value, (tuple, list)):
        yield encode(canonical(value))
        return
    yield "["
    for i, item in enumerate(value):
        yield (", " if i else "") + encode(canonical(item))
    yield "]"
