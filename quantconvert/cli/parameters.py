"""Commands of the command line, made from the options that `quantconvert.options` declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from quantconvert.cli.words import Argument, Command, option_word
from quantconvert.options import Declared
from quantconvert.options.table import LIMITS, RULES, SCHEME


class HelpCommand(TyperCommand):
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


def command_of(command: Command) -> Callable[..., None]:
    """The function that typer reads and calls: a parameter an argument, flag or option."""
    options = command.options

    def call(context: typer.Context, **words: Any) -> None:
        raise typer.Exit(command.run(context.obj, words))

    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    parameters += [_argument(argument) for argument in command.arguments]
    parameters += [parameter for option in options.values() for parameter in _parameters(option)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__name__, call.__doc__ = command.name, command.help
    call.arguments = command.arguments  # type: ignore[attr-defined]
    return call


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
            _parameter(option_word(option, negative=bool(i)), bool, flags, option, help, False)
            for i, (flags, help) in enumerate(named)
        ]
    kind = list[str] if option.kind == "list" else (str | None)
    return [_parameter(option_word(option), kind, option.flags, option, option.help, None, metavar=option.metavar)]


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
