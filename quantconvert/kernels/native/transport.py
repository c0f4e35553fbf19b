"""Bytes by the C library: from file to file, and their checksum."""

from __future__ import annotations

from dataclasses import dataclass

from quantconvert.kernels.base import Unread, Unwritten
from quantconvert.kernels.native.fields import TransferFields, Wrong
from quantconvert.kernels.native.library import Library, address_of


@dataclass(frozen=True, slots=True)
class Transport:
    """name: of the checksum."""

    library: Library
    name: str = "xxh64"

    def sum(self, data: memoryview, seed: int) -> int:
        """XXH64 (doc/xxhash_spec.md of xxHash) of writable memory."""
        return self.library.xxh64(data, seed)

    def copy(self, source: tuple[int, int], target: tuple[int, int], nbytes: int, buffer: memoryview) -> None:
        """`nbytes` from a descriptor and an offset to others, through `buffer`; raises `Unread` and `Unwritten`."""
        fields = TransferFields(
            source=source[0], source_offset=source[1], target=target[0], target_offset=target[1], nbytes=nbytes,
            buffer=address_of(buffer), buffer_nbytes=len(buffer),
        )  # fmt: skip
        wrong = self.library.copy(fields)
        if Wrong.UNWRITTEN in wrong:
            raise Unwritten(fields.error)
        if wrong:
            raise Unread
