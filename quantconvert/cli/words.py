"""Commands as values, and the words that are plain enough to be read without the parser.

Nearly all calls are `plan SRC --bits 4`: a command, its arguments, options and their values. These are read here. All
else - help, completion, abbreviations, mistakes - is the parser's (`cli/parser.py`), which takes longer to import than
a small plan to make, and knows the messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from quantconvert.cli.failures import Session, guarded
from quantconvert.cli.lines import flush_stdout
from quantconvert.cli.signals import DONE, RUNNING, take_signals
from quantconvert.errors import UsageError
from quantconvert.options import (
    CheckOptions,
    ConvertOptions,
    Declared,
    FinishOptions,
    ObserveOptions,
    PlanOptions,
    PushOptions,
    ReportOptions,
    SourceOptions,
    TranscodeOptions,
    VerifyOptions,
    read_group,
)
from quantconvert.options.option import nearest_word
from quantconvert.options.words import (
    CheckWords,
    ConvertWords,
    DequantizeWords,
    PlanWords,
    QuietWords,
    RepackWords,
    ReportWords,
    ShowWords,
    VerifyWords,
)

# What people type for a command of another name.
OTHER_WORDS = {"quantize": "convert", "quantise": "convert", "info": "inspect", "show": "inspect",
               "upload": "push", "help": "--help"}  # fmt: skip
_NEGATIVE = re.compile(r"-\d+")
# Set where the shell asks what a word may go on with.
COMPLETE = "_QUANTCONVERT_COMPLETE"


class Argument(NamedTuple):
    """A word without a flag."""

    name: str
    metavar: str
    help: str
    required: bool = True

    @property
    def usage(self) -> str:
        return self.metavar if self.required else f"[{self.metavar}]"


SOURCE = Argument("source", "SRC", "Local folder, or a Hub repository id such as org/model.")
QUANTIZED = Argument("source", "SRC", "A quantized checkpoint: local folder or Hub repository id.")
OUT = Argument("out", "OUT", "Folder for the result: new, empty, or of an interrupted run.")
WHERE = OUT._replace(help=f"{OUT.help} None with --push-to-hub: nothing stays here.", required=False)
MAYBE_OUT = Argument("out", "OUT", "Where the result would go: checked too when given.", required=False)
STATISTICS = Argument("out", "STATS", "File for the statistics, such as stats.safetensors.")
CONVERTED = Argument("folder", "OUT", "A converted checkpoint: local folder or Hub repository (`org/model`).")
FINISHED = Argument("folder", "OUT", "A finished result: local folder.")
REPO = Argument("repo", "REPO", "Repository on the Hub, such as me/model-int4; made where there is none.")
PARTS = Argument("out", "OUT", "The folder that commands with --shards K/N were given.")
ANY = Argument("folder", "DIR", "A checkpoint: local folder or Hub repository id.")

# The body of a command: its arguments, then the library's options that were given, then the command line's own.
Body = Callable[..., None]


class Command(NamedTuple):
    """A command: its name, what it does, its arguments, the `TypedDict` of the options that go to the library, and that
    of those that stay here. load: imports the body.
    """

    name: str
    help: str
    arguments: Sequence[Argument]
    library: type
    own: type
    load: Callable[[str], Body]

    @property
    def options(self) -> dict[str, Declared]:
        return {**read_group(self.library), **read_group(self.own)}

    def run(self, session: Session, words: Mapping[str, Any]) -> int:
        """Do it, with words by the names of arguments and of `option_word`; the exit code."""
        body = self.load(self.name)  # before a signal may raise: an exception in the middle of an import can be lost
        take_signals(RUNNING)
        with guarded(session) as ending:
            values = given(self.options, words)
            body(
                *(words[argument.name] for argument in self.arguments),
                {name: value for name, value in values.items() if name in read_group(self.library)},
                {name: value for name, value in values.items() if name in read_group(self.own)},
            )
            flush_stdout()
        take_signals(DONE)
        return ending.code


def _body(name: str) -> Body:
    from quantconvert.cli import commands

    body: Body = getattr(commands, name)
    return body


COMMANDS = {
    name: Command(name, help, arguments, library, own, _body)
    for name, help, arguments, library, own in (
        ("convert", "Convert SRC into OUT.", [SOURCE, WHERE], ConvertOptions, ConvertWords),
        ("plan", "What a conversion would do, from headers; writes nothing.", [SOURCE, MAYBE_OUT], PlanOptions,
         PlanWords),
        ("finish", "End what --shards K/N began beside OUT: check it, make the rest.", [PARTS], FinishOptions,
         QuietWords),
        ("verify", "Check a result: headers, config, checksums, codes, values.", [CONVERTED], VerifyOptions,
         VerifyWords),
        ("inspect", "What a checkpoint holds: dtypes, sizes, schemes.", [ANY], SourceOptions, ShowWords),
        ("check", "Run a result beside its source: KL divergence, perplexity.", [CONVERTED], CheckOptions, CheckWords),
        ("report", "Where a conversion lost what: as a page, a picture, tables.", [CONVERTED], ReportOptions,
         ReportWords),
        ("observe", "Run the model; what its layers read, for --statistics.", [SOURCE, STATISTICS],
         ObserveOptions, QuietWords),
        ("push", "A finished result to the Hub, in one commit.", [FINISHED, REPO], PushOptions, QuietWords),
        ("repack", "Another layout, the same codes, scales and zero points.", [QUANTIZED, OUT], TranscodeOptions,
         RepackWords),
        ("dequantize", "Plain again: (code - zero point) * scale, rounded once.", [QUANTIZED, OUT], TranscodeOptions,
         DequantizeWords),
    )
}  # fmt: skip


def check_source(word: str) -> None:
    """Refuse a mistyped command before it is looked for on the Hub as a model; raises `UsageError`."""
    meant = OTHER_WORDS.get(word) or nearest_word(word, tuple(COMMANDS))
    if meant and word.isalpha() and not os.path.lexists(word):
        hint = f"did you mean `{meant}`? For a model of that name: quantconvert convert {word} OUT"
        raise UsageError(f"`{word}` is no command and no folder", hint=hint)


def read_plain(args: Sequence[str]) -> tuple[Command, dict[str, Any]] | None:
    """The command and its words; None where the parser has to be asked. Raises `UsageError` as `check_source`."""
    if not args or args[0].startswith("-") or os.environ.get(COMPLETE) or os.name == "nt":  # which expands patterns
        return None
    if args[0] not in COMMANDS:
        check_source(args[0])
        args = ["convert", *args]
    command = COMMANDS[args[0]]
    found = _read(command, args[1:])
    return None if found is None else (command, found)


def _read(command: Command, args: Sequence[str]) -> dict[str, Any] | None:
    flags = {flag: option for option in command.options.values() for flag in option.flags}
    opposites = {o.option.negative: o for o in command.options.values() if o.kind == "flag" and o.option.negative}
    words: dict[str, Any] = {}
    names = [argument.name for argument in command.arguments]
    least = sum(argument.required for argument in command.arguments)
    places: list[str] = []
    left = list(reversed(args))
    while left:
        arg = left.pop()
        name, equals, value = arg.partition("=")
        option = flags.get(name)
        if not arg.startswith("-"):
            places.append(arg)
        elif arg in opposites:
            words[option_word(opposites[arg], negative=True)] = True
        elif option is None or (option.kind == "flag" and equals):
            return None
        elif option.kind == "flag":
            words[option_word(option)] = True
        else:
            if not equals:
                value = left.pop() if left else "-"
            if not equals and value.startswith("-") and not _NEGATIVE.fullmatch(value):
                return None
            word = option_word(option)
            words[word] = [*words.get(word, ()), value] if option.kind == "list" else value
    if not least <= len(places) <= len(names) or not all(map(_is_text, args)):
        return None
    return words | dict.fromkeys(names) | dict(zip(names, places, strict=False))


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def given(options: Mapping[str, Declared], words: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, from the parsed words; raises `UsageError`."""
    values: dict[str, Any] = {}
    for name, option in options.items():
        value = words.get(option_word(option))
        if option.option.negative and words.get(option_word(option, negative=True)):
            if value:
                raise UsageError(f"{option.flag} contradicts {option.option.negative}", hint="give one of them")
            values[name] = False
        elif value not in (None, False, []):
            values[name] = option.from_text(value) if isinstance(value, str) else value
    return values


def option_word(option: Declared, negative: bool = False) -> str:
    """The parameter's name; options and arguments share one space (`source` of `verify` is an option)."""
    return f"{'not' if negative else 'option'}_{option.name}"
