"""The command line: parse, call the library, print."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

from quantconvert.cli.failures import Session, guarded
from quantconvert.cli.lines import flush_stdout, print_text
from quantconvert.cli.parameters import (
    ANY,
    CONVERTED,
    MAYBE_OUT,
    OUT,
    QUANTIZED,
    SOURCE,
    STATISTICS,
    Argument,
    Body,
    Command,
    command_of,
)
from quantconvert.errors import UsageError
from quantconvert.options import (
    ConvertOptions,
    ObserveOptions,
    PlanOptions,
    SourceOptions,
    TranscodeOptions,
    VerifyOptions,
)
from quantconvert.options.option import nearest_word
from quantconvert.options.table import (
    ConvertWords,
    DequantizeWords,
    PlanWords,
    QuietWords,
    RepackWords,
    ShowWords,
    VerifyWords,
)
from quantconvert.version import __version__

EPILOG = """
Examples:

\b
  quantconvert ./model out --bits 4 --group-size 128
  quantconvert org/model out --scheme W8A16 --revision main
  quantconvert ./model out --ignore '*.down_proj' --rule '*.v_proj=W8A16'
  quantconvert plan ./model --bits 4 --explain    decides all, writes nothing
  quantconvert verify out --source ./model        each value, half a step
  quantconvert inspect out                        what a checkpoint holds
  quantconvert observe ./model stats.safetensors --text text.txt

Exit codes: 0 done, 2 usage, 3 checkpoint, 4 unsupported, 5 output, 6 verification, 129 hung up, 130 interrupted,
143 terminated, 1 a bug of ours.
After an interruption the same command continues; `--restart` starts over.
"""

# What people type for a command of another name.
OTHER_WORDS = {"quantize": "convert", "quantise": "convert", "check": "verify", "info": "inspect", "show": "inspect",
               "help": "--help"}  # fmt: skip


class DefaultGroup(TyperGroup):
    """`quantconvert SRC OUT` means `quantconvert convert SRC OUT`: a first word that is no command is a source."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `convert` unless a command or a question about the program itself comes first."""
        ctx.ensure_object(Session).as_json = "--json" in args
        own = {flag for param in self.get_params(ctx) for flag in param.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            if not ctx.resilient_parsing:
                _check_source(args[0], tuple(self.commands))
            args = ["convert", *args]
        return super().parse_args(ctx, args)


def _check_source(word: str, commands: Sequence[str]) -> None:
    """Refuse a mistyped command before it is looked for on the Hub as a model; raises `UsageError`."""
    meant = OTHER_WORDS.get(word) or nearest_word(word, commands)
    if meant and word.isalpha() and not os.path.lexists(word):
        hint = f"did you mean `{meant}`? For a model of that name: quantconvert convert {word} OUT"
        raise UsageError(f"`{word}` is no command and no folder", hint=hint)


app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        from quantconvert.kernels import kernel_label

        print_text(f"quantconvert {__version__}\nkernel {kernel_label()}\n")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def program(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print version and kernel."
    ),
) -> None:
    """Convert a Hugging Face checkpoint to int4 or int8 that inference engines load as it is.

    `quantconvert SRC OUT [options]` is short for `quantconvert convert SRC OUT [options]`.
    """


# Name, what it does, its arguments, the library's options, the command line's own.
COMMANDS: tuple[tuple[str, str, Sequence[Argument], type, type], ...] = (
    ("convert", "Convert SRC into OUT.", [SOURCE, OUT], ConvertOptions, ConvertWords),
    ("plan", "What a conversion would do, from headers; writes nothing.", [SOURCE, MAYBE_OUT], PlanOptions, PlanWords),
    ("verify", "Check a result: headers, config, checksums, codes, values.", [CONVERTED], VerifyOptions, VerifyWords),
    ("inspect", "What a checkpoint holds: dtypes, sizes, schemes.", [ANY], SourceOptions, ShowWords),
    ("observe", "Run SRC in transformers; what its layers read, for --statistics.", [SOURCE, STATISTICS],
     ObserveOptions, QuietWords),
    ("repack", "Another layout, the same codes, scales and zero points.", [QUANTIZED, OUT], TranscodeOptions,
     RepackWords),
    ("dequantize", "Plain again: (code - zero point) * scale, rounded once.", [QUANTIZED, OUT], TranscodeOptions,
     DequantizeWords),
)  # fmt: skip


def _body(name: str) -> Body:
    from quantconvert.cli import commands

    body: Body = getattr(commands, name)
    return body


for name, help, arguments, library, own in COMMANDS:
    epilog = EPILOG if name == "convert" else None
    app.command(name, cls=Command, epilog=epilog)(command_of(name, help, partial(_body, name), arguments, library, own))


def main() -> int:
    """Run the program with the process's arguments; the exit code."""
    session = Session()
    with guarded(session) as ending:
        ending.code = app(prog_name="quantconvert", obj=session, standalone_mode=False) or 0
        flush_stdout()
    return ending.code
