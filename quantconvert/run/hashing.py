"""sha256 of the result's shards, made behind those who write them: of each file from its start on, as far as it goes.

A file's sha256 is one chain that no second core can help with; several files are hashed at once.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from pathlib import Path

from quantconvert import machine
from quantconvert.errors import OutputError
from quantconvert.planning import Output, Plan, Task

# What is hashed at a time, and how much of it is read at a time.
RUN_NBYTES, READ_NBYTES = 1 << 24, 1 << 20


class _Chain:
    """One file: what of it is written without a gap, and what of that is hashed."""

    def __init__(self, fd: int, whole: int, nbytes: int) -> None:
        self.fd, self.nbytes = fd, nbytes
        self.hash, self.hashed, self.whole = hashlib.sha256(), 0, whole
        self._apart: list[tuple[int, int]] = []
        self.is_taken = False

    def add(self, begin: int, end: int) -> None:
        """Take a range that is written."""
        heappush(self._apart, (begin, end))
        while self._apart and self._apart[0][0] <= self.whole:
            self.whole = max(self.whole, heappop(self._apart)[1])

    @property
    def is_due(self) -> bool:
        """Whether there is enough to hash, or all that is left."""
        ready = self.whole - self.hashed
        return not self.is_taken and (ready >= RUN_NBYTES or (ready > 0 and self.whole == self.nbytes))


class Hashes:
    """The sums of a plan's shards in `folder`, which are there under their partial names when something of them is
    added. Any thread may add.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._chains: dict[int, _Chain] = {}
        self._changed = threading.Condition()
        self._stop = False
        self._errors: list[OutputError] = []

    def add(self, tasks: Iterable[Task]) -> None:
        """What these tasks write is in its files."""
        self.add_parts((output, 0, output.nbytes) for task in tasks for output in task.outputs)

    def add_parts(self, parts: Iterable[tuple[Output, int, int]]) -> None:
        """These bytes of these outputs are in their files."""
        with self._changed:
            for output, begin, end in parts:
                self._chain(output.shard).add(output.offset + begin, output.offset + end)
            if self._due() is not None:
                self._changed.notify()

    def _chain(self, number: int) -> _Chain:
        if number not in self._chains:
            shard = self.plan.shards[number]
            try:
                fd = os.open(self.folder / f"{shard.file}.partial", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise OutputError(f"cannot read back `{shard.file}`: {error.strerror}") from error
            self._chains[number] = _Chain(fd, len(shard.header), shard.nbytes)
        return self._chains[number]

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Hash by `count` threads what is added inside the block."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            for thread in threads:
                thread.join()
            for chain in self._chains.values():
                if chain.fd >= 0:
                    os.close(chain.fd)

    def _work(self) -> None:
        buffer = memoryview(bytearray(READ_NBYTES))
        while (chain := self._next()) is not None:
            try:
                self._hash(chain, buffer)
            except OSError as error:  # raised by `finish`
                self._errors.append(OutputError(f"cannot read back a file of the result: {error.strerror}"))
            except OutputError as error:
                self._errors.append(error)
            finally:
                with self._changed:
                    chain.is_taken = False
                    self._changed.notify_all()

    def _next(self) -> _Chain | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._errors or self._due() is not None)
            chain = None if self._stop or self._errors else self._due()
            if chain is not None:
                chain.is_taken = True
            return chain

    def _due(self) -> _Chain | None:
        return next((chain for chain in self._chains.values() if chain.is_due), None)

    def _hash(self, chain: _Chain, buffer: memoryview) -> None:
        """A run of what is whole, so that a thread soon looks again who needs it most."""
        end = min(chain.whole, chain.hashed + RUN_NBYTES)
        while chain.hashed < end and not self._stop:
            count = machine.read_at(chain.fd, buffer[: end - chain.hashed], chain.hashed)
            if count == 0:
                raise OutputError("a file of the result was made shorter by somebody else")
            chain.hash.update(buffer[:count])
            chain.hashed += count

    def sum_of(self, number: int) -> str:
        """Wait for the sum of one shard, all of which has been added; raises `OutputError` where it cannot be had."""
        with self._changed:
            chain = self._chain(number)
            self._changed.wait_for(lambda: self._stop or self._errors or chain.hashed == chain.nbytes)
            if self._errors:
                raise self._errors[0]
            if self._stop:
                raise OutputError("the run has ended")
            return chain.hash.hexdigest()

    def release(self, number: int) -> None:
        """Close a shard whose sum is known, so that it can be removed."""
        with self._changed:
            chain = self._chains[number]
            os.close(chain.fd)
            chain.fd = -1

    def finish(self) -> dict[str, str]:
        """Wait for the sums of all shards, hexadecimal, by file; raises `OutputError` where one cannot be read."""
        with self._changed:
            while not self._errors and not all(chain.hashed == chain.nbytes for chain in self._chains.values()):
                self._changed.wait(0.2)  # in short steps, so that the main thread hears signals
        if self._errors:
            raise self._errors[0]
        chains: Sequence[tuple[int, _Chain]] = sorted(self._chains.items())
        return {self.plan.shards[number].file: chain.hash.hexdigest() for number, chain in chains}
