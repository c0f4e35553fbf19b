"""What an option is: its words for people, its default, and the check that every value passes, wherever it came from.

A declaration is one line of a `TypedDict`: `workers: Annotated[int, Option("Threads.", ...)]`. The type says what the
values are; `read_group` turns such a class into `Declared` options, of which command lines, recipes and jobs are made.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from quantconvert.errors import UsageError

Kind = Literal["text", "number", "decimal", "size", "flag", "list"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option, but for its name and type.

    flags: how a command line spells it, `--its-name` where nothing is said. negative: the flag that says no, with its
    own help. shown: the default in words. choices: the words that are allowed, from a registry or, where nothing is
    said, from the type. suggest: words for shell completion where others are allowed too. item: makes one value of a
    list from its text, of type `made`. least: the smallest number. most: the largest of numbers from 0 on that need not
    be whole; without it they are above 0. changes: whether it can change bytes of the result (then it is in a job's
    JSON and in the command of the model card). in_card: whether it changes the card alone.
    hidden: whether help says nothing of it, because no value but the default is registered yet. in_recipe: whether a
    recipe may hold it. is_file: the value is the path of a file, of whose folder reports and cards say nothing.
    """

    help: str
    flags: tuple[str, ...] = ()
    negative: str | None = None
    negative_help: str = ""
    metavar: str | None = None
    default: Any = None
    shown: str | None = None
    panel: str | None = None
    choices: Callable[[], Iterable[str]] | None = None
    suggest: Callable[[], Iterable[str]] | None = None
    item: Callable[[str], Any] = str
    kind: type = str
    least: int | None = None
    most: float | None = None
    changes: bool = False
    in_card: bool = False
    hidden: bool = False
    in_recipe: bool = False
    is_file: bool = False

    def shareable(self, value: Any) -> Any:
        """The value as others may see it."""
        return Path(value).name if self.is_file and value is not None else value


@dataclass(frozen=True, slots=True)
class Declared:
    """An option with its name and what its type says."""

    name: str
    kind: Kind
    words: tuple[str, ...]
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def flag(self) -> str:
        """The flag that messages name."""
        return self.flags[0]

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed; none where any text is."""
        return tuple(self.option.choices()) if self.option.choices else self.words

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Words for shell completion."""
        return tuple(self.option.suggest()) if self.option.suggest else self.choices

    @property
    def metavar(self) -> str:
        """What stands for the value in a help text."""
        return self.option.metavar or "|".join(self.choices) or self.name.upper()

    @property
    def help(self) -> str:
        """The sentence for people, and the default."""
        shown = self.option.shown or (None if self.option.default in (None, False, ()) else self.option.default)
        return f"{self.option.help} [default: {shown}]" if shown is not None else self.option.help

    def from_text(self, text: str) -> Any:
        """What a command line's text says; raises `UsageError`."""
        if self.kind not in ("number", "decimal"):
            return text
        try:
            return int(text) if self.kind == "number" else float(text)
        except ValueError:
            kind = "a whole number" if self.kind == "number" else self._decimals
            raise UsageError(f"{self.flag}: expected {kind}, got `{text}`") from None

    def checked(self, value: Any) -> Any:
        """The value in its own type (a size as bytes, a list as a tuple of items); raises `UsageError`."""
        match self.kind:
            case "flag":
                return self._of_type(value, bool, "true or false")
            case "number":
                return self._number(value)
            case "decimal":
                return self._decimal(value)
            case "size":
                return parse_size(value, self.flag)
            case "list":
                return self._items(value)
        return self._text(value)

    def as_words(self, value: Any) -> list[str]:
        """The command line's words for a checked value."""
        match self.kind:
            case "flag":
                return [self.flag if value else self.option.negative or ""]
            case "list":
                return [word for item in value for word in (self.flag, str(item))]
            case "size":
                return [self.flag, size_text(value)]
        return [self.flag, str(self.option.shareable(value))]

    def _text(self, value: Any) -> str:
        text: str = self._of_type(value, str, "text")
        if self.choices and text not in self.choices:
            near = nearest_word(text, self.choices)
            raise UsageError(f"{self.flag}: expected {', '.join(self.choices)}, got `{text}`", hint=did_you_mean(near))
        return text

    def _of_type(self, value: Any, kind: type, words: str) -> Any:
        if not isinstance(value, kind):
            raise UsageError(f"{self.flag}: expected {words}, got {value!r}")
        return value

    def _number(self, value: Any) -> int:
        least = self.option.least
        if type(value) is not int or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            raise UsageError(f"{self.flag}: expected a whole number{bound}, got {value!r}")
        return value

    @property
    def _decimals(self) -> str:
        return "a number above 0" if self.option.most is None else f"a number from 0 to {self.option.most:g}"

    def _decimal(self, value: Any) -> float:
        known = type(value) in (int, float) and math.isfinite(value)
        most = self.option.most
        if not known or (value <= 0 if most is None else not 0 <= value <= most):
            raise UsageError(f"{self.flag}: expected {self._decimals}, got {value!r}")
        return float(value)

    def _items(self, value: Any) -> tuple[Any, ...]:
        """One value alone needs no list; items that are no text are taken as they are."""
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        ready = self.option.kind if self.option.kind is not str else ()
        return tuple(item if isinstance(item, ready) else self.option.item(self._text(item)) for item in values)


@cache
def read_group(group: type) -> Mapping[str, Declared]:
    """The options of a `TypedDict`, by name, those of its bases first."""
    return {name: _declared(name, hint) for name, hint in get_type_hints(group, include_extras=True).items()}


def _declared(name: str, hint: Any) -> Declared:
    assert get_origin(hint) is Annotated, f"{name} has no Option"
    kind, option = get_args(hint)
    kinds = [part for part in (get_args(kind) if _is_union(kind) else (kind,)) if part is not NoneType]
    words = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
    return Declared(name, _kind(kinds), words, option)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _kind(kinds: Sequence[Any]) -> Kind:
    if float in kinds:
        return "decimal"
    if int in kinds:
        return "size" if str in kinds else "number"
    if bool in kinds:
        return "flag"
    return "list" if get_origin(kinds[0]) is Sequence else "text"


def check_values(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are given (not None), checked; raises `UsageError`, also for a name that `group` lacks."""
    options = read_group(group)
    for name in values:
        if name not in options:
            raise UsageError(f"unknown option `{name}`", hint=did_you_mean(nearest_word(name, options)))
    return {name: options[name].checked(value) for name, value in values.items() if value is not None}


def nearest_word(word: str, words: Iterable[str]) -> str | None:
    """The word that may have been meant; case does not count."""
    by_lower = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str | None) -> str | None:
    """The hint for a word that may have been meant."""
    return f"did you mean `{word}`?" if word else None


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(value: int | str, flag: str) -> int:
    """Bytes from `5GB` (decimal), `512MiB` (binary) or a number; raises `UsageError` naming `flag`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(f"{flag}: expected a size such as `5GB` or `512MiB`, got `{value}`")
    return int(float(match[1]) * unit)


def size_text(nbytes: int) -> str:
    """The shortest text that `parse_size` reads back: `5GB`."""
    for unit in ("TB", "GB", "MB", "KB"):
        if nbytes and nbytes % _UNITS[unit] == 0:
            return f"{nbytes // _UNITS[unit]}{unit}"
    return str(nbytes)
