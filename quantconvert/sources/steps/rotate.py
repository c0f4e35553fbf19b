"""Rotation of a model, exact before quantization: outliers of single channels are spread over all of them.

After QuaRot (S. Ashkboos et al., 2024) and SpinQuant (Z. Liu et al., 2024), what of both is done to weights alone: R1
turns the residual stream, R2 attention's values between the projection that gives them and the one that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantconvert.errors import QuantConvertError, UnsupportedError
from quantconvert.sources.steps.base import Step, StepContext
from quantconvert.sources.steps.hadamard import factors_of
from quantconvert.sources.steps.turn import Fill, TurnColumns, TurnRows

if TYPE_CHECKING:
    from quantconvert.families import Stream
    from quantconvert.sources.read import Read
    from quantconvert.sources.stream import StreamReads, ValueReads


class RotateStream:
    """R1: embeddings, writers and readers of the stream are turned; norms give their gains to what reads them.

    A head that is tied to the embeddings becomes a tensor of its own: gains and rotation part the two.
    """

    name = "r1"

    def plan(self, reads: Sequence[Read], context: StepContext, errors: list[QuantConvertError]) -> list[Read]:
        from quantconvert.sources.stream import find_stream

        stream = _table(context, errors)
        if stream is None or context.family is None:
            return list(reads)
        found = find_stream(reads, context.family, stream, context.checkpoint, errors)
        if found is None or not _mixes("r1", found.width, errors):
            return list(reads)
        context.changes["tie_word_embeddings"] = False
        return list(_turned(reads, found))


def _turned(reads: Sequence[Read], found: StreamReads) -> Iterator[Read]:
    """The reads with their steps; a tied head after the embeddings that it is read from."""
    steps = dict(_stream_steps(found))
    for read in reads:
        if read.name == found.embeddings.name:
            yield _with(found.embeddings, steps[read.name])
            if found.is_tied:
                yield _with(found.head, steps[found.head.name])
        else:
            yield _with(read, steps[read.name]) if read.name in steps else read


def _with(read: Read, step: Step) -> Read:
    return replace(read, steps=(*read.steps, step))


def _stream_steps(found: StreamReads) -> Iterator[tuple[str, Step]]:
    """Each tensor of the stream by name, and what is done to it."""
    width = found.width
    yield found.embeddings.name, TurnColumns(width)
    for norm in found.norms:
        yield norm.read.name, Fill(0.0 if norm.plus_one else 1.0)
        yield from ((reader.name, TurnColumns(width, norm.read.values, norm.plus_one)) for reader in norm.readers)
    for read in found.writers:
        yield read.name, TurnRows(width) if len(read.shape) == 2 else TurnColumns(width)


class RotateValues:
    """R2: in each layer the heads of the values are turned, and the columns that read them."""

    name = "r2"

    def plan(self, reads: Sequence[Read], context: StepContext, errors: list[QuantConvertError]) -> list[Read]:
        from quantconvert.sources.stream import find_values

        stream = _table(context, errors)
        if stream is None:
            return list(reads)
        found = find_values(reads, stream, context.checkpoint, errors)
        if not all(_mixes("r2", size, errors) for size in {values.size for values in found}):
            return list(reads)
        steps = dict(step for values in found for step in _value_steps(values))
        return [_with(read, steps[read.name]) if read.name in steps else read for read in reads]


def _value_steps(values: ValueReads) -> Iterator[tuple[str, Step]]:
    yield values.reader.name, TurnColumns(values.size)
    for read in values.givers:
        yield (
            read.name,
            (TurnRows(values.size, values.start, values.period) if len(read.shape) == 2 else TurnColumns(values.size)),
        )


def _table(context: StepContext, errors: list[QuantConvertError]) -> Stream | None:
    """The table of the stream; None, with one refusal for all rotations, where there is none."""
    from quantconvert.sources.stream import table_of

    try:
        return table_of(context.family, context.checkpoint)
    except UnsupportedError as error:
        if error.message not in [known.message for known in errors]:
            errors.append(error)
        return None


def _mixes(name: str, size: int, errors: list[QuantConvertError]) -> bool:
    """Whether a Hadamard matrix of that size mixes anything; a refusal where it does not."""
    if factors_of(size).order > 1:
        return True
    errors.append(
        UnsupportedError(
            f"--rotate {name}: {size} channels are an odd number, of which no two can be mixed: expected an even one",
            hint="convert without --rotate",
        )
    )
    return False
