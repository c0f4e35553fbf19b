"""The parser, by typer: for help, completion and what is no plain words."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from quantconvert.cli.failures import Session
from quantconvert.cli.lines import print_text
from quantconvert.cli.parameters import HelpCommand, command_of
from quantconvert.cli.words import COMMANDS, check_source
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
  quantconvert report out --html out.html         where it lost what
  quantconvert observe ./model stats.safetensors --text text.txt

Exit codes: 0 done, 2 usage, 3 checkpoint, 4 unsupported, 5 output, 6 verification, 129 hung up, 130 interrupted,
143 terminated, 1 a bug of ours.
After an interruption the same command continues; `--restart` starts over.
"""


class DefaultGroup(TyperGroup):
    """`quantconvert SRC OUT` means `quantconvert convert SRC OUT`: a first word that is no command is a source."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `convert` unless a command or a question about the program itself comes first."""
        ctx.ensure_object(Session).as_json = "--json" in args
        own = {flag for param in self.get_params(ctx) for flag in param.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            if not ctx.resilient_parsing:
                check_source(args[0])
            args = ["convert", *args]
        return super().parse_args(ctx, args)


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
    """Convert a Hugging Face checkpoint to int4, int8, float8 or float4 that inference engines load as it is.

    `quantconvert SRC OUT [options]` is short for `quantconvert convert SRC OUT [options]`.
    """


for name, command in COMMANDS.items():
    app.command(name, cls=HelpCommand, epilog=EPILOG if name == "convert" else None)(command_of(command))
