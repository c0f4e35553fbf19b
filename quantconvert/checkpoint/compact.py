"""Headers as nearly all writers write them: no spaces, keys in one order, names in ASCII. Split by one pattern in
half the time; whatever is anything else is for `checkpoint/header.py`, which knows what is wrong.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

# A name, dtype and shape, begin, end. Inside of a string no quote stands alone, so that it cannot match there.
_ENTRY = re.compile(
    r'"([ !#-\[\]-~]{1,256})":\{("dtype":"[0-9A-Z_]{1,16}","shape":\[[0-9,]{0,640}\]),'
    r'"data_offsets":\[(0|[1-9][0-9]{0,18}),(0|[1-9][0-9]{0,18})\]\}'
)


class Columns(NamedTuple):
    """A header by columns, one value a tensor; kinds: the JSON of dtype and shape, without braces. metadata: JSON."""

    names: list[str]
    kinds: list[str]
    begins: list[int]
    ends: list[int]
    metadata: str | None


def split_header(raw: bytes) -> Columns | None:
    """The columns of a header; None where it is written in any other way, or names something twice."""
    if not raw.isascii():
        return None
    parts = _ENTRY.split(raw.decode())
    first, last, names = parts[0], parts[-1].rstrip(" "), parts[1::5]
    between = parts[5:-1:5]
    if not names or last != "}" or between.count(",") != len(between) or len(set(names)) != len(names):
        return None
    metadata = _metadata(first)
    if "__metadata__" in names or (metadata is None and first != "{"):
        return None
    return Columns(names, parts[2::5], list(map(int, parts[3::5])), list(map(int, parts[4::5])), metadata)


def _metadata(first: str) -> str | None:
    """What stands before the first tensor, `{"__metadata__":{...},`, as an object of its own."""
    before, comma, rest = first.rpartition(",")
    if not comma or rest or not before.startswith('{"__metadata__":{'):
        return None
    return before + "}"


def dtype_and_shape(kind: str) -> tuple[str, tuple[int, ...]] | None:
    """What a kind says; None where it is not JSON (`[1,,2]`, `[01]`)."""
    try:
        found = json.loads("{" + kind + "}")
    except ValueError:
        return None
    return found["dtype"], tuple(found["shape"])
