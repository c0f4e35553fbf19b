"""Everything that can go wrong, as one tree; each class carries the process exit code.

    QuantConvertError            1  (never raised itself: a bare one would be our bug)
    +-- UsageError               2  the options contradict each other or do not exist
    +-- CheckpointError          3  the source cannot be read as a checkpoint
    +-- UnsupportedError         4  readable, but not convertible as asked
    +-- OutputError              5  exists, disk full, inside the source, in use, an interrupted run of another kind
    +-- VerificationError        6  the result is not what was promised
    +-- Refusal                  *  several of the above at once; the lowest of their exit codes

A message says what failed, where, what was expected and what was found, without a full stop after one
sentence; `hint` is the command or flag to try.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.text import clean


class QuantConvertError(Exception):
    """Base class: a message for a person, an optional hint, and the exit code of the process.

    Both texts lose control characters and tokens here, wherever they came from.
    """

    exit_code = 1
    label = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = clean(message)
        self.hint = None if hint is None else clean(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UsageError(QuantConvertError):
    """Options that do not exist, contradict each other, or match nothing."""

    exit_code = 2
    label = "usage"


class CheckpointError(QuantConvertError):
    """The source is missing, truncated, lying, or not a checkpoint."""

    exit_code = 3
    label = "checkpoint"


class UnsupportedError(QuantConvertError):
    """The source is readable, but what was asked of it cannot be done."""

    exit_code = 4
    label = "unsupported"


class OutputError(QuantConvertError):
    """The result cannot be written where it was asked for."""

    exit_code = 5
    label = "output"


class VerificationError(QuantConvertError):
    """A checkpoint is not what its config, its report or its source says."""

    exit_code = 6
    label = "verification"


class Refusal(QuantConvertError):
    """All refusals of one plan together; `errors` keeps each with its own class and hint, by exit code."""

    label = "refused"

    def __init__(self, errors: Sequence[QuantConvertError]) -> None:
        self.errors = tuple(sorted(errors, key=lambda error: error.exit_code))
        self.exit_code = self.errors[0].exit_code
        super().__init__("\n\n".join(str(error) for error in self.errors))

    def __reduce__(self) -> tuple[type[Refusal], tuple[Sequence[QuantConvertError]]]:
        return type(self), (self.errors,)


def some(names: Sequence[str]) -> str:
    """The first three names in backticks, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def raise_all(errors: Sequence[QuantConvertError]) -> None:
    """Raise nothing, the single error, or one `Refusal` that holds them all."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Refusal(errors)
