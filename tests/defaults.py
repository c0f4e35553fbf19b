"""The default of `--equalize` that the library has in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quantconvert.options import JobOptions, read_group


@contextmanager
def default_of_equalize(value: bool | None) -> Iterator[None]:
    """None is the users' own; processes that tests start have it too."""
    option = read_group(JobOptions)["equalize"].option
    before = option.default
    object.__setattr__(option, "default", value)
    try:
        yield
    finally:
        object.__setattr__(option, "default", before)
