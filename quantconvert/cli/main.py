"""The command line: parse, call the library, print. Errors become exit codes in one place, `_exit_codes`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from quantconvert import api
from quantconvert.cli import options as opt
from quantconvert.cli.output import (
    plain,
    print_inventory,
    print_json,
    print_plan,
    print_result,
    print_verification,
    result_json,
    stderr,
)
from quantconvert.cli.progress import ProgressReporter
from quantconvert.errors import QuantConvertError, Refusal, VerificationError
from quantconvert.events import silent
from quantconvert.job import JobOptions
from quantconvert.planning import Plan
from quantconvert.recipe import merged, read_recipe, write_recipe
from quantconvert.run.output import free_nbytes
from quantconvert.version import __version__

EPILOG = """
Examples:

  quantconvert ./model out --bits 4 --group-size 128

  quantconvert org/model out --scheme W8A16 --revision main

  quantconvert ./model out --ignore '*.down_proj' --ignore 're:.*layers\\.0\\.'

  quantconvert plan ./model --bits 4 --explain      (decides everything, writes nothing)

  quantconvert verify out --source ./model          (every value within half a step)

  quantconvert inspect out                          (what a checkpoint holds)

Exit codes: 0 done, 2 usage, 3 checkpoint, 4 unsupported, 5 output, 6 verification, 130 interrupted, 143 terminated,
1 a bug of ours.
After an interruption the same command continues; `--restart` starts over.
"""


class DefaultGroup(TyperGroup):
    """`quantconvert SRC OUT` means `quantconvert convert SRC OUT`: a first word that is no command is a source."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `convert` unless a command or a question about the program itself comes first."""
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["convert", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        print(f"quantconvert {__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Convert a Hugging Face checkpoint to int4 or int8 that inference engines load as it is.

    `quantconvert SRC OUT [options]` is short for `quantconvert convert SRC OUT [options]`.
    """


@app.command(epilog=EPILOG)
def convert(
    source: opt.Source,
    out: opt.Out,
    bits: opt.Bits = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    scheme: opt.SchemeName = None,
    format: opt.FormatName = None,
    ignore: opt.Ignore = None,
    rules: opt.Rules = None,
    recipe: opt.Recipe = None,
    preset: opt.Preset = None,
    tensor_parallel: opt.TensorParallel = None,
    on_indivisible: opt.OnIndivisible = None,
    nan_policy: opt.NanPolicy = None,
    requantize: opt.Requantize = None,
    strict: opt.Strict = None,
    allow_incomplete: opt.AllowIncomplete = None,
    max_shard_size: opt.MaxShardSize = None,
    memory_limit: opt.MemoryLimit = "2GB",
    workers: opt.Workers = 0,
    revision: opt.Revision = None,
    subfolder: opt.Subfolder = None,
    base_model: opt.BaseModel = None,
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    verify: opt.Verify = False,
    dry_run: bool = typer.Option(False, "--dry-run", help="Plan only; same as `quantconvert plan SRC OUT`."),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Convert SRC into OUT."""
    asked = _asked(locals(), recipe)
    if dry_run:
        planned = partial(api.plan, source, out, revision=revision, subfolder=subfolder, overwrite=overwrite, **asked)
        _show_plan(planned, out, json, quiet, verbose)
        return
    where: Any = {
        "revision": revision,
        "subfolder": subfolder,
        "overwrite": overwrite,
        "restart": restart,
        "verify": verify,
    }
    _convert(partial(api.convert, source, out, **where, **asked), out, json, quiet, verbose)


@app.command()
def plan(
    source: opt.Source,
    out: opt.MaybeOut = None,
    bits: opt.Bits = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    scheme: opt.SchemeName = None,
    format: opt.FormatName = None,
    ignore: opt.Ignore = None,
    rules: opt.Rules = None,
    recipe: opt.Recipe = None,
    preset: opt.Preset = None,
    tensor_parallel: opt.TensorParallel = None,
    on_indivisible: opt.OnIndivisible = None,
    nan_policy: opt.NanPolicy = None,
    requantize: opt.Requantize = None,
    strict: opt.Strict = None,
    allow_incomplete: opt.AllowIncomplete = None,
    max_shard_size: opt.MaxShardSize = None,
    memory_limit: opt.MemoryLimit = "2GB",
    workers: opt.Workers = 0,
    revision: opt.Revision = None,
    subfolder: opt.Subfolder = None,
    overwrite: opt.Overwrite = False,
    as_recipe: opt.WriteRecipe = False,
    explain: opt.Explain = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """What a conversion would do: decisions, sizes, memory, disk. Reads headers only, writes nothing."""
    asked = _asked(locals(), recipe)
    planned = partial(api.plan, source, out, revision=revision, subfolder=subfolder, overwrite=overwrite, **asked)
    _show_plan(planned, out, json, quiet, verbose or explain, as_recipe)


@app.command()
def verify(
    folder: opt.Converted,
    source: opt.VerifySource = None,
    revision: opt.Revision = None,
    subfolder: opt.Subfolder = None,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check a converted checkpoint: headers, config, checksums, codes; with --source every value."""
    with _exit_codes():
        found = api.verify(folder, source, revision=revision, subfolder=subfolder)
        if json:
            print_json(found.to_json())
        else:
            print_verification(found, verbose)
        if not found.is_ok:
            raise typer.Exit(VerificationError.exit_code)


@app.command()
def inspect(
    folder: opt.Folder,
    revision: opt.Revision = None,
    subfolder: opt.Subfolder = None,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """What a checkpoint holds, quantized or not: dtypes, sizes, schemes."""
    with _exit_codes():
        inventory = api.inspect(folder, revision=revision, subfolder=subfolder)
        if json:
            print_json(inventory.to_json())
        else:
            print_inventory(inventory, verbose)


@app.command()
def repack(
    source: opt.Quantized,
    out: opt.Out,
    format: opt.Layout,
    max_shard_size: opt.MaxShardSize = None,
    memory_limit: opt.MemoryLimit = "2GB",
    workers: opt.Workers = 0,
    base_model: opt.BaseModel = None,
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    verify: opt.Verify = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Another layout for a quantized checkpoint: the same codes, scales and zero points."""
    asked: Any = _asked(locals()) | {"overwrite": overwrite, "restart": restart, "verify": verify}
    _convert(lambda **talk: api.repack(source, out, **talk, **asked), out, json, quiet, verbose)


@app.command()
def dequantize(
    source: opt.Quantized,
    out: opt.Out,
    dtype: opt.DType = "bfloat16",
    max_shard_size: opt.MaxShardSize = None,
    memory_limit: opt.MemoryLimit = "2GB",
    workers: opt.Workers = 0,
    base_model: opt.BaseModel = None,
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    verify: opt.Verify = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """A quantized checkpoint back into a plain one: (code - zero point) * scale, rounded once."""
    asked: Any = _asked(locals()) | {"dtype": dtype, "overwrite": overwrite, "restart": restart, "verify": verify}
    _convert(lambda **talk: api.dequantize(source, out, **talk, **asked), out, json, quiet, verbose)


def _convert(work: Callable[..., api.Result], out: Path, json: bool, quiet: bool, verbose: bool) -> None:
    """Run one conversion with progress, and print what it did."""
    words = ["OUT" if word == str(out) else word for word in sys.argv[1:]]
    command = shlex.join(["quantconvert", *_recorded(words)])
    with _exit_codes(), nullcontext(silent) if quiet else ProgressReporter(verbose=verbose) as report:
        result = work(report=report, command=command)
    if json:
        print_json(result_json(result))
    if not quiet:
        print_result(result)


# Options that change no byte of the result; two stand before a value.
_UNRECORDED = {"--quiet", "-q", "--verbose", "-v", "--json", "--restart", "--overwrite", "--verify"}
_UNRECORDED_VALUES = {"--workers", "--memory-limit"}


def _recorded(arguments: Sequence[str]) -> list[str]:
    """The command for the model card, the same for the same result: without what says only how it was made or shown."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not skip and argument not in _UNRECORDED and name not in _UNRECORDED_VALUES:
            kept.append(_without_folders(argument))
        skip = not skip and argument in _UNRECORDED_VALUES
    return kept[1:] if kept[:1] == ["convert"] else kept


def _without_folders(argument: str) -> str:
    """The name alone of a local folder or file: where it lies is nobody's business, and differs from run to run."""
    return Path(argument).name or argument if os.sep in argument and Path(argument).expanduser().exists() else argument


def _asked(values: dict[str, Any], recipe: Path | None = None) -> dict[str, Any]:
    """The library's `JobOptions` among a command's parameters, over those of a recipe."""
    options = {key: value for key, value in values.items() if key in JobOptions.__annotations__ and value is not None}
    if recipe is None:
        return options
    with _exit_codes():
        return merged(read_recipe(recipe), options)


def _show_plan(
    planned: Callable[[], Plan], out: Path | None, json: bool, quiet: bool, explain: bool, as_recipe: bool = False
) -> None:
    with _exit_codes():
        made = planned()
        if as_recipe:
            print(write_recipe(made.job, made.format), end="")
        elif json:
            print_json(made.to_json() | {"free_nbytes": free_nbytes(out or Path.cwd())})
        elif not quiet:
            print_plan(made, free_nbytes(out or Path.cwd()), explain)


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread so that everything is cleaned up on the way out."""


def _on_signal(signum: int, frame: FrameType | None) -> None:
    """Stop, and journal what is done; a second signal kills at once, which the next run survives as well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt if signum == signal.SIGINT else _Terminated


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Every error that has a message becomes that message and its exit code; anything else is a bug's traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    try:
        yield
        sys.stdout.flush()
    except QuantConvertError as error:
        _print_error(error)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except (KeyboardInterrupt, _Terminated) as interruption:
        notes = getattr(interruption, "__notes__", ["the output folder is as it was before"])
        stderr.print(f"interrupted: {plain(notes[-1])}")
        raise typer.Exit(130 if isinstance(interruption, KeyboardInterrupt) else 143) from None


def _print_error(error: QuantConvertError) -> None:
    parts = error.errors if isinstance(error, Refusal) else (error,)
    for i, part in enumerate(parts):
        if i:
            stderr.print()
        stderr.print(f"[red]error:[/red] {plain(part.message)}")
        if part.hint:
            stderr.print(f"\n[bold]hint:[/bold] {plain(part.hint)}")
    for note in getattr(error, "__notes__", ()):
        stderr.print(f"\n{plain(note)}")


def run() -> None:
    """The console script."""
    app()
