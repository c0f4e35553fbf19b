"""Between the workers and an outlet: shards leave when they are complete, and others are opened when there is room."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quantconvert.errors import OutputError
from quantconvert.run.ledger import Ledger
from quantconvert.run.outlet import Outlet, Shipped

# A shard that is filled, and one that is sent.
SLOTS = 2
POLL_SECONDS = 0.2
# A transfer that goes on is left to itself when a run ends.
PATIENCE_SECONDS = 1.5


class Dock:
    """Ships what the ledger completes, from a thread of its own."""

    def __init__(self, ledger: Ledger, outlet: Outlet, basis: str) -> None:
        self.ledger, self.outlet, self.basis = ledger, outlet, basis
        self._open: set[int] = set()
        self._asking: Counter[int] = Counter()
        self._waiting: list[int] = []
        self._busy = self._stop = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def admit(self, shard: int, pulse: Callable[[], None]) -> None:
        """Wait until a shard may be opened; raises what shipping raised. pulse: called meanwhile, may raise."""
        with self._changed:
            self._asking[shard] += 1
            try:
                while not self._has_room(shard):
                    self._raise()
                    self._changed.wait(POLL_SECONDS)
                    pulse()
            finally:
                self._asking[shard] -= 1
            self._open.add(shard)
            self._raise()

    def _has_room(self, shard: int) -> bool:
        """Whether it is open, or the first of those that ask and fewer are open than may be."""
        there = self._open | self.ledger.reopened
        first = min(number for number, count in self._asking.items() if count)
        return shard in there or (shard == first and len(there) < SLOTS)

    def complete(self, shard: int) -> None:
        """A shard has its name."""
        with self._changed:
            self._open.add(shard)
            self._waiting.append(shard)
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is shipped; raises what that raised."""
        with self._changed:
            while self._waiting or self._busy:
                self._raise()
                self._changed.wait(POLL_SECONDS)  # in short steps, so that the main thread hears signals
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    @contextmanager
    def running(self) -> Iterator[Dock]:
        """Ship inside the block."""
        thread = threading.Thread(target=self._work, daemon=True)
        self.ledger.admit, self.ledger.completed = self.admit, self.complete
        thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            thread.join(PATIENCE_SECONDS)

    def _work(self) -> None:
        try:
            while self._ship_next():
                pass
        except BaseException as error:  # raised by those who wait
            with self._changed:
                self._error, self._busy = error, False
                self._changed.notify_all()

    def _ship_next(self) -> bool:
        """Ship all that waits; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop or (self._waiting and self.outlet.pause <= 0), POLL_SECONDS)
            if self._stop or not self._waiting or self.outlet.pause > 0:
                return not self._stop
            shards, self._busy = list(self._waiting), True
            self._waiting.clear()
        self.outlet.ship(self.ledger.folder, {shard: self._shipped(shard) for shard in shards})
        with self._changed:
            if not self._stop:
                for shard in shards:
                    self._remove(shard)
            self._open.difference_update(shards)
            self.ledger.reopened.difference_update(shards)
            self._busy = False
            self._changed.notify_all()
        return True

    def _shipped(self, shard: int) -> Shipped:
        done = self.ledger.journal.done
        results = {index: done[index] for index in self.ledger.plan.by_shard[shard]}
        return Shipped(self.ledger.hashes.sum_of(shard), results, self.basis)

    def _remove(self, shard: int) -> None:
        self.ledger.hashes.release(shard)
        path = self.ledger.folder / self.ledger.plan.shards[shard].file
        try:
            path.unlink(missing_ok=True)  # an outlet may have moved it
        except OSError as error:
            raise OutputError(f"cannot remove `{path}`: {error.strerror}") from error
