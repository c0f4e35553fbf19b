"""Checksums of what tasks write, for the journal: of each piece of a tensor, added up modulo 2^64.

A piece is summed with its first byte's number in the tensor as the seed, so that pieces can be written and summed in
any order, by anybody. What a tile of rows makes is a piece, except where a tensor is stored transposed: those are cut
into equal ones. The sums find lost and torn writes; they prove nothing against malice, as sha256 does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from quantconvert.kernels import find_transport
from quantconvert.planning import Output, Task
from quantconvert.planning.tasks import Copy, Split
from quantconvert.spans import spans

PIECE_NBYTES = 1 << 20


def pieces_of(task: Task, output: Output) -> Iterator[tuple[int, int]]:
    """The pieces of a task's output as half-open ranges of its bytes; each fits in memory."""
    spec = output.spec
    if spec.transposed:
        yield from spans(0, spec.nbytes, PIECE_NBYTES)
    elif isinstance(task, Copy | Split) or not spec.rows_per_element:
        yield 0, spec.nbytes
    else:
        rows, shared = task.source.matrix[0], spec.rows_per_element
        row_nbytes = spec.nbytes // max(1, -(-rows // shared))
        for first, last in spans(0, rows, task.cut.tile_rows):
            yield first // shared * row_nbytes, -(-last // shared) * row_nbytes


class Sums:
    """What sums here: XXH64 by the C library, else blake2b of eight bytes."""

    def __init__(self) -> None:
        self._transport = find_transport()
        self.name = self._transport.name if self._transport else "blake2b"

    def of(self, data: memoryview, begin: int) -> int:
        """The sum of the piece that begins at byte `begin`; `data` is writable memory, and stays as it is."""
        if self._transport is not None:
            return self._transport.sum(data, begin)
        digest = hashlib.blake2b(data, digest_size=8, salt=begin.to_bytes(16, "little"))
        return int.from_bytes(digest.digest(), "little")

    def text(self, total: int) -> str:
        """A tensor's sum as the journal has it: `xxh64:0123456789abcdef`."""
        return f"{self.name}:{total % (1 << 64):016x}"
