"""What is compared: tensors of a result, each with its origin in the source; and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from quantconvert.errors import QuantConvertError
from quantconvert.events import Progress, Reporter
from quantconvert.sources import Read, Sources, as_stored
from quantconvert.sources.read import PLAIN
from quantconvert.verification.findings import Check, Finding, TensorError


@dataclass(slots=True)
class Values:
    """What was found: how many tensors equal their source, how far the weights are, and everything that is wrong."""

    num_equal: int = 0
    errors: list[TensorError] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, check: Check, where: str, message: str) -> None:
        self.findings.append(Finding(check, where, message))

    def add_all(self, other: Values) -> None:
        self.num_equal += other.num_equal
        self.errors += other.errors
        self.findings += other.findings


class Stopped(Exception):
    """Another worker failed, or the user interrupted."""


class Pace:
    """Tells of progress, for several threads; once it is stopped, whoever reports ends."""

    def __init__(self, report: Reporter) -> None:
        self._report, self._lock, self._stop = report, threading.Lock(), threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def pulse(self) -> None:
        """Called by those who wait; raises `Stopped`."""
        if self._stop.is_set():
            raise Stopped

    def advance(self, name: str, nbytes: int) -> None:
        """So many more bytes of a tensor are done; raises `Stopped`."""
        self.pulse()
        with self._lock:
            self._report(Progress(name, nbytes))


class Meter:
    """The progress of one tensor, which may be checked more than once: only what goes beyond is told."""

    def __init__(self, tensor: Read, pace: Pace) -> None:
        self._tensor, self._pace, self._done = tensor, pace, 0

    def upto(self, part: int, whole: int) -> None:
        """`part` of `whole` is done; raises `Stopped`."""
        done = max(self._done, self._tensor.nbytes * part // max(1, whole))
        self._pace.advance(self._tensor.name, done - self._done)
        self._done = done


class Pair(NamedTuple):
    """A tensor, what it comes from (None: not known), and its progress."""

    tensor: Read
    origin: Read | None
    meter: Meter


def pairs_of(tensors: Sequence[Read], sources: Sources | None, pace: Pace, found: Values) -> Iterator[Pair]:
    """Each tensor with its origin; what one side has and the other lacks is a finding."""
    known = {source.name: source for source in sources.reads} if sources else {}
    for tensor in tensors:
        origin = known.pop(tensor.name, None)
        if sources and origin is None:
            origin = _fused(known, tensor)
        if sources and origin is None:
            found.add("values", tensor.name, "is not in the source")
        else:
            yield Pair(tensor, kept(origin) if origin and tensor.stored is None else origin, Meter(tensor, pace))
    used = {tensor.name for tensor in tensors}
    for name, source in known.items():
        if name not in used and source.values.name not in used:
            found.add("values", name, "is in the source, but not in the result")


def _fused(known: dict[str, Read], tensor: Read) -> Read | None:
    """The stored tensor that holds several weights of the source, where the result kept it as it is."""
    part = next((s for s in known.values() if s.values.name == tensor.name), None)
    return as_stored(part.values) if part else None


def kept(origin: Read) -> Read:
    """The origin of what is not quantized: what is stored transposed is kept so."""
    same = origin.encoding == PLAIN and origin.view.expert is None and not origin.steps
    return as_stored(origin.values) if same else origin


# Whether a tensor of a result is its origin's; None: another has to say.
Same = Callable[[Read, Read, Meter], "bool | None"]


def check_kept(pair: Pair, same: Same) -> Values | None:
    """A tensor in high precision: the source's bytes, or its values decoded, changed and rounded once. None where
    `same` leaves it open.
    """
    tensor, origin, meter = pair
    found = Values()
    if origin is None:
        return found
    if tensor.shape != origin.shape:
        found.add("values", tensor.name, f"expected shape {list(origin.shape)}, got {list(tensor.shape)}")
        return found
    is_same = _may_be_same(tensor, origin) and same(tensor, origin, meter)
    if is_same is None:
        return None
    if not is_same:
        found.add("values", tensor.name, "differs from the source, which it should equal")
    found.num_equal += is_same
    meter.upto(1, 1)
    return found


def _may_be_same(tensor: Read, origin: Read) -> bool:
    """Nothing but what is decoded, and no vector, takes another dtype."""
    decoded = not origin.is_stored and not origin.steps and len(origin.shape) != 1
    return decoded or tensor.dtype == origin.dtype


def refused(pair: Pair, check: Callable[[Pair], Values | None]) -> Values | None:
    """What `check` finds; what it cannot read is a finding."""
    try:
        return check(pair)
    except QuantConvertError as error:
        found = Values()
        found.add("values", pair.tensor.name, error.message)
        return found
