"""QUANTCONVERT_KERNEL: which kernel the user wants."""

from __future__ import annotations

import os

from quantconvert.errors import QuantConvertError, UsageError
from quantconvert.kernels.native.library import Library, find_library

VARIABLE = "QUANTCONVERT_KERNEL"


def chosen() -> tuple[Library, int] | None:
    """The library and the number of its level; None for torch. Raises `UsageError` for what is not to be had here."""
    word = os.environ.get(VARIABLE, "").strip()
    library = find_library()
    levels = library.levels if library else ()
    if word == "torch" or (not word and not levels):
        return None
    if library and levels and word in ("", "native"):
        return library, len(levels) - 1
    if library and word in levels:
        return library, levels.index(word)
    known = ", ".join(("torch", *(("native", *levels) if levels else ())))
    raise UsageError(f"{VARIABLE}: expected one of {known}, got `{word}`", hint=_hint(word, bool(levels)))


def _hint(word: str, is_native: bool) -> str:
    if not is_native and word == "native":
        return "this installation has no C kernel for this processor; with a compiler, `pip install` builds it"
    return f"unset {VARIABLE} for the best there is"


def check_choice(errors: list[QuantConvertError]) -> None:
    """Refuse a choice that is not to be had here."""
    try:
        chosen()
    except UsageError as error:
        errors.append(error)
