"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantconvert.cli.lines import print_json, stderr
from quantconvert.cli.signals import Terminated
from quantconvert.cli.streams import ReaderGone, StdoutError, drop_stdout
from quantconvert.errors import QuantConvertError, Refusal, UsageError
from quantconvert.options.option import did_you_mean, nearest_word

CLOSED_PIPE = 141  # as a shell says it for SIGPIPE


@dataclass(slots=True)
class Session:
    """What is known of this call: whether a program reads stdout, and wants errors there too."""

    as_json: bool = False


@dataclass(slots=True)
class Ending:
    """How a guarded block ended."""

    code: int = 0


@contextmanager
def guarded(session: Session) -> Iterator[Ending]:
    """Errors of the block become messages and an exit code; what has no message is a bug's traceback."""
    ending = Ending()
    try:
        yield ending
    except ReaderGone:  # whoever read our output has seen enough
        drop_stdout()
        ending.code = CLOSED_PIPE
    except (KeyboardInterrupt, Terminated) as interruption:
        notes = getattr(interruption, "__notes__", ["the output folder is as it was before"])
        stderr.print(f"interrupted: {notes[-1]}")
        ending.code = 130 if isinstance(interruption, KeyboardInterrupt) else interruption.exit_code
    except Exit as asked:
        ending.code = asked.code
    except QuantConvertError as error:
        ending.code = _report(error, session.as_json)
    except _of_parser() as error:
        ending.code = _answer(error, session.as_json)


class Exit(Exception):
    """The command ends with an exit code, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _of_parser() -> tuple[type[Exception], ...]:
    """The parser's own exceptions, if it was imported; older versions of typer take them from click."""
    typer = sys.modules.get("typer")
    if typer is None:
        return ()
    return typer.Abort, typer.Exit, next(k for k in typer.BadParameter.__mro__ if k.__name__ == "ClickException")


def _answer(error: Any, as_json: bool) -> int:
    """The exit code of what the parser raised."""
    kind = type(error).__name__
    if kind == "Exit":
        return int(error.exit_code)
    if kind == "Abort":
        return 1
    if kind == "NoArgsIsHelpError":
        stderr.print(str(error.args[0]))
        return UsageError.exit_code
    return _report(_usage(error), as_json)


def _report(error: QuantConvertError, as_json: bool) -> int:
    print_error(error)
    if isinstance(error, StdoutError):
        drop_stdout()
    elif as_json:
        try:
            print_json({"exit_code": error.exit_code, "errors": [_error_json(part) for part in _parts(error)]})
        except (StdoutError, ReaderGone):
            drop_stdout()
    return error.exit_code


def _parts(error: QuantConvertError) -> tuple[QuantConvertError, ...]:
    return error.errors if isinstance(error, Refusal) else (error,)


def _error_json(error: QuantConvertError) -> dict[str, Any]:
    return {"kind": error.label, "exit_code": error.exit_code, "message": error.message, "hint": error.hint}


def print_error(error: QuantConvertError) -> None:
    """Each error and its hint, on stderr."""
    for i, part in enumerate(_parts(error)):
        if i:
            stderr.print()
        stderr.print(part.message, label="error:", style="red")
        if part.hint:
            stderr.print()
            stderr.print(part.hint, label="hint:")
    for note in getattr(error, "__notes__", ()):
        stderr.print(f"\n{note}")


def _usage(error: Any) -> UsageError:
    """What the parser complains of, in our words."""
    context = getattr(error, "ctx", None)
    usage = f"usage: {' '.join(context.get_usage().removeprefix('Usage: ').split())}" if context else None
    kind = type(error).__name__
    if kind == "NoSuchOption":
        known = [flag for param in context.command.get_params(context) for flag in param.opts] if context else []
        near = did_you_mean(nearest_word(error.option_name, known))
        return UsageError(f"unknown option `{error.option_name}`", hint=near or usage)
    if kind == "MissingParameter" and error.param is not None:
        param = error.param
        name = param.opts[0] if param.param_type_name == "option" else param.metavar
        return UsageError(f"{name} is missing", hint=usage)
    message = str(error.format_message()).rstrip(".")
    return UsageError(message[:1].lower() + message[1:], hint=usage)
