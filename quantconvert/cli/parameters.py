"""Commands of the command line, made from the options that `quantconvert.options` declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from quantconvert.cli.failures import guarded
from quantconvert.cli.lines import flush_stdout
from quantconvert.cli.signals import DONE, RUNNING, take_signals
from quantconvert.errors import UsageError
from quantconvert.options import Declared, read_group
from quantconvert.options.table import LIMITS, RULES, SCHEME


@dataclass(frozen=True, slots=True)
class Argument:
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
MAYBE_OUT = Argument("out", "OUT", "Where the result would go: checked too when given.", required=False)
STATISTICS = Argument("out", "STATS", "File for the statistics, such as stats.safetensors.")
CONVERTED = Argument("folder", "OUT", "A converted checkpoint: local folder.")
ANY = Argument("folder", "DIR", "A checkpoint: local folder or Hub repository id.")

# The body of a command: its arguments, then the library's options that were given, then the command line's own.
Body = Callable[..., None]


class Command(TyperCommand):
    """A command whose help shows arguments as they are typed, and options under the headings of their panels."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`SRC [OUT] [OPTIONS]`."""
        arguments: Sequence[Argument] = getattr(self.callback, "arguments", ())
        return [*(argument.usage for argument in arguments), "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then panel by panel, those of no panel last."""
        panels: dict[str, list[tuple[str, str]]] = {
            name: [] for name in ("Arguments", SCHEME, RULES, LIMITS, "Options")
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            panel = "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None)
            if record is not None:
                panels.setdefault(panel or "Options", []).append(record)
        for name, rows in panels.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


def command_of(
    name: str, help: str, load: Callable[[], Body], arguments: Sequence[Argument], library: type, own: type
) -> Callable[..., None]:
    """The function that typer reads and calls: a parameter an argument, flag or option.

    load: imports the body, before a signal may raise: an exception in the middle of an import can be lost. library:
    the `TypedDict` of the options that go to the library; own: those that stay here. The body gets two dictionaries of
    them, of what was given alone.
    """
    options = {**read_group(library), **read_group(own)}

    def call(context: typer.Context, **words: Any) -> None:
        body = load()
        take_signals(RUNNING)
        with guarded(context.obj) as ending:
            values = given(options, words)
            body(
                *(words[argument.name] for argument in arguments),
                {name: value for name, value in values.items() if name in read_group(library)},
                {name: value for name, value in values.items() if name in read_group(own)},
            )
            flush_stdout()
        take_signals(DONE)
        raise typer.Exit(ending.code)

    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    parameters += [_argument(argument) for argument in arguments]
    parameters += [parameter for option in options.values() for parameter in _parameters(option)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__name__, call.__doc__ = name, help
    call.arguments = arguments  # type: ignore[attr-defined]
    return call


def given(options: Mapping[str, Declared], words: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, from the parsed words; raises `UsageError`."""
    values: dict[str, Any] = {}
    for name, option in options.items():
        value = words.get(_name(option))
        if option.option.negative and words.get(_name(option, negative=True)):
            if value:
                raise UsageError(f"{option.flag} contradicts {option.option.negative}", hint="give one of them")
            values[name] = False
        elif value not in (None, False, []):
            values[name] = option.from_text(value) if isinstance(value, str) else value
    return values


def _name(option: Declared, negative: bool = False) -> str:
    """The parameter's name; options and arguments share one space (`source` of `verify` is an option)."""
    return f"{'not' if negative else 'option'}_{option.name}"


def _argument(argument: Argument) -> inspect.Parameter:
    info = typer.Argument(metavar=argument.metavar, help=argument.help, show_default=False)
    kind = Annotated[str if argument.required else (str | None), info]  # type: ignore[valid-type]
    default = inspect.Parameter.empty if argument.required else None
    return inspect.Parameter(argument.name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _parameters(option: Declared) -> list[inspect.Parameter]:
    """One parameter, or two where a flag has an opposite, so that both together are noticed."""
    if option.kind == "flag":
        no = option.option.negative
        named = [(option.flags, option.help)] + ([((no,), option.option.negative_help)] if no else [])
        return [
            _parameter(_name(option, negative=bool(i)), bool, flags, option, help, False)
            for i, (flags, help) in enumerate(named)
        ]
    kind = list[str] if option.kind == "list" else (str | None)
    return [_parameter(_name(option), kind, option.flags, option, option.help, None, metavar=option.metavar)]


def _parameter(
    name: str, kind: Any, flags: Sequence[str], option: Declared, help: str, default: Any, **more: Any
) -> inspect.Parameter:
    words = option.suggestions

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    info = typer.Option(
        *flags,
        help=help,
        show_default=False,
        rich_help_panel=option.option.panel,
        hidden=option.option.hidden,
        autocompletion=complete if words else None,
        **more,
    )
    default = [] if kind == list[str] else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)
