"""Where every output tensor goes: shards by size, and the exact bytes of each shard's header.

The order inside a file is that of `safetensors.serialize` (dtype rank descending, then name), so that our files equal
those of safetensors' own writer byte for byte (huggingface/safetensors `safetensors/src/tensor.rs`, `prepare`).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

from quantconvert.checkpoint.files import SINGLE_NAME
from quantconvert.dtypes import DTYPES, nbytes_of
from quantconvert.errors import UnsupportedError
from quantconvert.layouts import TensorSpec
from quantconvert.planning.plan import Output, Shard
from quantconvert.sources import Source, Weight


class Promise(NamedTuple):
    """An output tensor that has no place yet."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows_per_element: int
    transposed: bool
    nbytes: int


def promised(module: str, specs: Iterable[TensorSpec]) -> tuple[Promise, ...]:
    """What a format promises for `module`, by full name."""
    return named(module, unnamed(specs))


def unnamed(specs: Iterable[TensorSpec]) -> tuple[Promise, ...]:
    """What a format promises for every module of one shape: the names are suffixes alone."""
    return tuple(Promise(s.suffix, s.dtype, s.shape, s.rows_per_element, s.transposed, s.nbytes) for s in specs)


def named(module: str, promises: Iterable[Promise]) -> tuple[Promise, ...]:
    """The same for one module."""
    return tuple(
        Promise(f"{module}.{p.name}", p.dtype, p.shape, p.rows_per_element, p.transposed, p.nbytes) for p in promises
    )


def unchanged(ref: Source) -> tuple[Promise, ...]:
    """A tensor that stays in high precision, under its own name."""
    rows = 1 if isinstance(ref, Weight) else 0
    return (Promise(ref.name, ref.dtype, ref.shape, rows, False, nbytes_of(ref.dtype, ref.num_elements)),)


def split_shards(sizes: Iterable[int], max_nbytes: int) -> list[int]:
    """The shard number of each unit, in order: a new shard begins when the next unit would not fit.

    A unit is all that comes from one source tensor, so a weight and its scales share a file; one larger than
    `max_nbytes` gets a file of its own.
    """
    numbers, number, used = [], 0, 0
    for size in sizes:
        if used and used + size > max_nbytes:
            number, used = number + 1, 0
        numbers.append(number)
        used += size
    return numbers


_RANKS = {tag: -dtype.rank for tag, dtype in DTYPES.items()}


def place(units: Sequence[Sequence[Promise]], max_nbytes: int) -> tuple[list[tuple[Output, ...]], tuple[Shard, ...]]:
    """Outputs with shard and offset, unit by unit, and the shards. Raises `UnsupportedError` for a name given twice."""
    _check_names(units)
    numbers = split_shards((sum(p.nbytes for p in unit) for unit in units), max_nbytes)
    count = (numbers[-1] + 1) if numbers else 0
    members: list[list[Promise]] = [[] for _ in range(count)]
    for unit, number in zip(units, numbers, strict=True):
        members[number] += unit
    placed: dict[str, Output] = {}
    shards = []
    for number, promises in enumerate(members):
        promises.sort(key=lambda p: (_RANKS[p.dtype], p.name))
        header = header_bytes(promises)
        offset = len(header)
        for p in promises:
            placed[p.name] = Output(
                p.name, p.dtype, p.shape, p.rows_per_element, p.transposed, number, offset, p.nbytes
            )
            offset += p.nbytes
        name = SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        shards.append(Shard(name, offset, header))
    return [tuple(placed[p.name] for p in unit) for unit in units], tuple(shards)


def _check_names(units: Sequence[Sequence[Promise]]) -> None:
    """A source tensor may be called what a format calls one of its own."""
    names = [promise.name for unit in units for promise in unit]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UnsupportedError(f"the result would hold `{twice}` twice: it is in the source, and made from a weight")


def header_bytes(promises: Sequence[Promise]) -> bytes:
    """The file's first bytes: length, JSON, and spaces up to a multiple of 8."""
    entries = ['{"__metadata__":{"format":"pt"}']
    offset = 0
    for p in promises:
        name, shape, end = encode_basestring(p.name), ",".join(map(str, p.shape)), offset + p.nbytes
        entries.append(f'{name}:{{"dtype":"{p.dtype}","shape":[{shape}],"data_offsets":[{offset},{end}]}}')
        offset = end
    raw = (",".join(entries) + "}").encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
