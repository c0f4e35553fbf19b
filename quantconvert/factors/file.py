"""The file that keeps factors: `quantconvert.factors`, safetensors under a name that no engine takes for weights.

One float32 vector a site, under the name of the module that gives it. Its header holds the sha256 of what follows, so
that it vouches for itself; names, shapes and places are known before anything is read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring_ascii
from pathlib import Path

from quantconvert.checkpoint import TensorRef
from quantconvert.checkpoint.header import header_text, metadata_of, parse_header
from quantconvert.checkpoint.ranges import open_regular
from quantconvert.errors import CheckpointError

FACTORS = "quantconvert.factors"
# In the hidden folder alone: importances that the first pass finds. And what stands for the user's file of statistics.
IMPORTANCES, STATISTICS = ".importances", ":statistics"


@dataclass(frozen=True)  # without slots, so that its header is measured once
class VectorFile:
    """What the file will hold, in order: names and lengths of vectors."""

    vectors: tuple[tuple[str, int], ...]

    def header(self, sha256: str = "0" * 64) -> bytes:
        """The bytes before the first vector; as long for every `sha256` (hexadecimal, of all vectors' bytes)."""
        entries = [f'{{"__metadata__":{{"sha256":{encode_basestring_ascii(sha256)}}}']
        offset = 0
        for name, count in self.vectors:
            end = offset + 4 * count
            own = f'{{"dtype":"F32","shape":[{count}],"data_offsets":[{offset},{end}]}}'
            entries.append(f"{encode_basestring_ascii(name)}:{own}")
            offset = end
        raw = (",".join(entries) + "}").encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    @cached_property
    def data_start(self) -> int:
        """Bytes before the first vector."""
        return len(self.header())

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + 4 * sum(count for _, count in self.vectors)


def place_vectors(file: VectorFile, name: str) -> tuple[TensorRef, ...]:
    """Where each vector will be, in the file of this name."""
    offset, places = file.data_start, []
    for vector, count in file.vectors:
        places.append(TensorRef(vector, "F32", (count,), name, offset, 4 * count))
        offset += 4 * count
    return tuple(places)


def beside(folder: Path, statistics: Path | None) -> Mapping[str, Path]:
    """The files that weights are read with, by the names that `TensorRef.file` has for them."""
    files = {FACTORS: folder / FACTORS, IMPORTANCES: folder / IMPORTANCES}
    return files | ({STATISTICS: statistics} if statistics else {})


def read_places(folder: Path, name: str = FACTORS, least: float = 0.0) -> Mapping[str, TensorRef]:
    """The vectors of a file in `folder` by name, none where there is no such file.

    Raises `CheckpointError` where it is damaged, or holds anything but finite numbers above `least`.
    """
    path = folder / name
    if not path.exists():
        return {}
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size

            def read(offset: int, nbytes: int) -> bytes:
                file.seek(offset)
                return file.read(nbytes)

            raw = header_text(read, name, size)
            refs = parse_header(raw, name, size)
            expected = metadata_of(raw, name).get("sha256")
            digest = hashlib.sha256()
            for begin in range(8 + len(raw), size, 1 << 20):
                part = read(begin, min(1 << 20, size - begin))
                digest.update(part)
                values = memoryview(part[: len(part) // 4 * 4]).cast("f")
                if not all(least < value < float("inf") for value in values):
                    raise CheckpointError(f"`{name}` holds a number that cannot be")
    except OSError as error:
        raise CheckpointError(f"cannot read `{name}`: {error.strerror}") from error
    if any(ref.dtype != "F32" or len(ref.shape) != 1 or not ref.nbytes for ref in refs):
        raise CheckpointError(f"`{name}`: expected vectors of F32")
    if digest.hexdigest() != expected:
        raise CheckpointError(f"`{name}` was changed: expected sha256 {expected}, got {digest.hexdigest()}")
    return {ref.name: ref for ref in refs}
