"""Where every output tensor goes: shards by size, and the exact bytes of each shard's header.

The order inside a file is that of `safetensors.serialize` (dtype rank descending, then name), so that our files equal
those of safetensors' own writer byte for byte (huggingface/safetensors `safetensors/src/tensor.rs`, `prepare`).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from json.encoder import encode_basestring
from operator import itemgetter

from quantconvert.checkpoint.files import SINGLE_NAME
from quantconvert.dtypes import DTYPES
from quantconvert.errors import UnsupportedError
from quantconvert.layouts import TensorSpec
from quantconvert.planning.plan import Shard
from quantconvert.planning.tasks import Output
from quantconvert.sources import Read

# The module and what is promised for it: all that comes from one source tensor.
Unit = tuple[str, tuple[TensorSpec, ...]]


def unchanged(source: Read) -> Unit:
    """A tensor that stays in high precision, under its own name; a part of a stored one is written by rows."""
    return source.name, (TensorSpec("", source.dtype, source.shape, 0 if source.is_stored else 1),)


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


def place(units: Sequence[Unit], max_nbytes: int) -> tuple[list[tuple[Output, ...]], tuple[Shard, ...]]:
    """Outputs with shard and offset, unit by unit, and the shards. Raises `UnsupportedError` for a name given twice."""
    sizes: dict[int, int] = {}  # of the specs of a unit: those of alike weights are one object
    for _, specs in units:
        if id(specs) not in sizes:
            sizes[id(specs)] = sum(spec.nbytes for spec in specs)
    numbers = split_shards((sizes[id(specs)] for _, specs in units), max_nbytes)
    count = (numbers[-1] + 1) if numbers else 0
    _check_names(units)
    outputs: list[tuple[Output, ...]] = []
    shards = []
    for number, group in groupby(zip(numbers, units, strict=True), key=itemgetter(0)):
        members = [unit for _, unit in group]
        promised = sorted(_promised(members))
        header = header_bytes([(name, members[i][1][k]) for _, name, i, k in promised])
        placed: list[list[Output]] = [[_NOWHERE] * len(specs) for _, specs in members]
        offset = len(header)
        for _, _, i, k in promised:
            module, specs = members[i]
            placed[i][k] = Output(specs[k], module, number, offset)
            offset += specs[k].nbytes
        outputs += map(tuple, placed)
        file = SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        shards.append(Shard(file, offset, header))
    return outputs, tuple(shards)


_NOWHERE = Output(TensorSpec("", "U8", ()), "", 0, 0)


def _promised(units: Sequence[Unit]) -> Iterator[tuple[int, str, int, int]]:
    """What orders a tensor in its file, rank and name, and whose it is: the place of its unit, and its own there."""
    alike: dict[int, list[tuple[int, str, int]]] = {}
    for i, (module, specs) in enumerate(units):
        known = alike.get(id(specs))
        if known is None:
            tails = [f".{spec.suffix}" if spec.suffix else "" for spec in specs]
            known = alike[id(specs)] = [(_RANKS[spec.dtype], tails[k], k) for k, spec in enumerate(specs)]
        for rank, tail, k in known:
            yield rank, module + tail, i, k


def _check_names(units: Sequence[Unit]) -> None:
    """A source tensor may be called what a layout calls one of its own."""
    made = {module: specs for module, specs in units if specs[0].suffix}
    kept = [name for name, specs in units if not specs[0].suffix]
    others = (name.rpartition(".") for name in kept)
    is_twice = len(made) + len(set(kept)) < len(units)
    if is_twice or any(last == spec.suffix for stem, _, last in others for spec in made.get(stem, ())):
        twice = Counter(name for _, name, _, _ in _promised(units)).most_common(1)[0][0]
        raise UnsupportedError(f"the result would hold `{twice}` twice: it is in the source, and made from a weight")


def header_bytes(tensors: Sequence[tuple[str, TensorSpec]]) -> bytes:
    """The file's first bytes: length, JSON, and spaces up to a multiple of 8."""
    entries = ['{"__metadata__":{"format":"pt"}']
    kinds: dict[int, str] = {}  # what alike tensors have in common
    offset = 0
    for name, spec in tensors:
        kind = kinds.get(id(spec))
        if kind is None:
            shape = ",".join(map(str, spec.shape))
            kind = kinds[id(spec)] = f'{{"dtype":"{spec.dtype}","shape":[{shape}],"data_offsets":['
        end = offset + spec.nbytes
        entries.append(f"{encode_basestring(name)}:{kind}{offset},{end}]}}")
        offset = end
    raw = (",".join(entries) + "}").encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
