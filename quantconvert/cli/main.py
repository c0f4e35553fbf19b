"""The command line: parse, call the library, print."""

from __future__ import annotations

import sys

from quantconvert.cli.failures import Session, guarded
from quantconvert.cli.lines import flush_stdout
from quantconvert.cli.words import read_plain


def main() -> int:
    """Run the program with the process's arguments; the exit code."""
    session = Session(as_json="--json" in sys.argv)
    with guarded(session) as ending:
        plain = read_plain(sys.argv[1:])
        if plain is not None:
            command, words = plain
            ending.code = command.run(session, words)
        else:
            from quantconvert.cli.parser import app

            ending.code = app(prog_name="quantconvert", obj=session, standalone_mode=False) or 0
        flush_stdout()
    return ending.code
