"""The command line: parse, call the library, print."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from quantconvert import api
from quantconvert.cli.explain import print_plan
from quantconvert.cli.failures import Session, guarded
from quantconvert.cli.output import (
    flush_stdout,
    print_inventory,
    print_json,
    print_observation,
    print_result,
    print_text,
    print_verification,
    result_json,
)
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
from quantconvert.cli.progress import ProgressReporter
from quantconvert.errors import UsageError, VerificationError
from quantconvert.events import Reporter, silent
from quantconvert.kernels import kernel_label
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
from quantconvert.planning import Plan
from quantconvert.recipe import merged, read_recipe, write_recipe
from quantconvert.run.folder import free_nbytes
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


def command(
    arguments: Sequence[Argument], library: type, own: type, epilog: str | None = None
) -> Callable[[Body], Body]:
    """Register the decorated body as a command with these arguments and options."""

    def register(body: Body) -> Body:
        call = command_of(body, arguments, library, own)
        app.command(name=body.__name__, cls=Command, epilog=epilog)(call)
        return body

    return register


@command([SOURCE, OUT], ConvertOptions, ConvertWords, EPILOG)
def convert(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Convert SRC into OUT."""
    _check_words(words)
    asked = _with_recipe(asked, words)
    if words.get("dry_run"):
        known = {name: value for name, value in asked.items() if name not in ("restart", "verify")}
        _show_plan(api.plan(source, out, **known), out, words)
        return
    with _reporter(words) as report:
        result = api.convert(source, out, report=report, **asked)
    _show_result(result, words)


@command([SOURCE, MAYBE_OUT], PlanOptions, PlanWords)
def plan(source: str, out: str | None, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """What a conversion would do, from headers; writes nothing."""
    _check_words(words)
    _show_plan(api.plan(source, out, **_with_recipe(asked, words)), out, words)


@command([CONVERTED], VerifyOptions, VerifyWords)
def verify(folder: str, where: dict[str, Any], words: dict[str, Any]) -> None:
    """Check a result: headers, config, checksums, codes, values."""
    with _reporter(words) as report:
        found = api.verify(folder, words.get("source"), report=report, **where)
    if words.get("json"):
        print_json(found.to_json())
    elif found.findings or not words.get("quiet"):
        print_verification(found, words.get("verbose", False))
    if not found.is_ok:
        raise typer.Exit(VerificationError.exit_code)


@command([ANY], SourceOptions, ShowWords)
def inspect(folder: str, where: dict[str, Any], words: dict[str, Any]) -> None:
    """What a checkpoint holds: dtypes, sizes, schemes."""
    inventory = api.inspect(folder, **where)
    if words.get("json"):
        print_json(inventory.to_json())
    else:
        print_inventory(inventory, words.get("verbose", False))


@command([SOURCE, STATISTICS], ObserveOptions, QuietWords)
def observe(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Run SRC in transformers; what its layers read, for --statistics."""
    with _reporter(words) as report:
        found = api.observe(source, out, report=report, **asked)
    if words.get("json"):
        print_json(found.to_json())
    if not words.get("quiet"):
        print_observation(found)


@command([QUANTIZED, OUT], TranscodeOptions, RepackWords)
def repack(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Another layout, the same codes, scales and zero points."""
    if "format" not in words:
        raise UsageError("--format is missing", hint="the layout to write: --format compressed-tensors, for example")
    acting = {"activations": words["activations"]} if "activations" in words else {}
    with _reporter(words) as report:
        result = api.repack(source, out, words["format"], report=report, **acting, **asked)
    _show_result(result, words)


@command([QUANTIZED, OUT], TranscodeOptions, DequantizeWords)
def dequantize(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Plain again: (code - zero point) * scale, rounded once."""
    dtype = {"dtype": words["dtype"]} if "dtype" in words else {}
    with _reporter(words) as report:
        result = api.dequantize(source, out, report=report, **dtype, **asked)
    _show_result(result, words)


def _with_recipe(asked: dict[str, Any], words: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, over those of a recipe."""
    return merged(read_recipe(Path(words["recipe"])), asked) if "recipe" in words else asked


def _show_result(result: api.Result, words: dict[str, Any]) -> None:
    if words.get("json"):
        print_json(result_json(result))
    if not words.get("quiet"):
        print_result(result)


def _reporter(words: dict[str, Any]) -> AbstractContextManager[Reporter]:
    _check_words(words)
    return nullcontext(silent) if words.get("quiet") else ProgressReporter(verbose=words.get("verbose", False))


def _show_plan(found: Plan, out: str | None, words: dict[str, Any]) -> None:
    if words.get("write_recipe"):
        print_text(write_recipe(found.job, found.format))
        return
    free = free_nbytes(Path(out) if out else Path.cwd())
    if words.get("json"):
        print_json(found.to_json() | {"free_nbytes": free})
    elif not words.get("quiet"):
        verbose = words.get("verbose", False)
        print_plan(found, free, "tensors" if verbose else "kinds" if words.get("explain") else "totals")


def _check_words(words: dict[str, Any]) -> None:
    if words.get("quiet") and words.get("verbose"):
        raise UsageError("--quiet contradicts --verbose", hint="give one of them")


def main() -> int:
    """Run the program with the process's arguments; the exit code."""
    session = Session()
    with guarded(session) as ending:
        ending.code = app(prog_name="quantconvert", obj=session, standalone_mode=False) or 0
        flush_stdout()
    return ending.code
