"""From a result's quantconvert.json to its numbers, and from these to files."""

from __future__ import annotations

import os
from pathlib import Path

from quantconvert.checkpoint import Repo
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.pictures.facts import Facts, facts_of
from quantconvert.pictures.page import page
from quantconvert.pictures.svg import picture
from quantconvert.run.disk import write_whole
from quantconvert.verification.report import MAX_NBYTES, REPORT_NAME, parse_report


def read_facts(repo: Repo) -> Facts:
    """The numbers of a result in `repo`; raises `CheckpointError` where its quantconvert.json does not say them."""
    file = next((file for file in repo.files() if file.path == REPORT_NAME), None)
    if file is None:
        raise CheckpointError(f"`{repo.location}` has no {REPORT_NAME}", hint="only results of quantconvert have one")
    if file.nbytes > MAX_NBYTES:
        raise CheckpointError(f"{REPORT_NAME} of `{repo.location}` has {file.nbytes} bytes, expected <= {MAX_NBYTES}")
    try:
        return facts_of(parse_report(repo.read(REPORT_NAME, 0, file.nbytes)), repo.location)
    except KeyError as error:
        said = f"{REPORT_NAME} of `{repo.location}` has no {error}: an older quantconvert wrote it"
        raise CheckpointError(said, hint="convert again") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        said = f"{REPORT_NAME} of `{repo.location}` is not as a conversion writes it: {error}"
        raise CheckpointError(said) from error


def write_pictures(facts: Facts, other: Facts | None, html: str | None, svg: str | None, overwrite: bool) -> None:
    """The page and the map as files, both or, where one is there already, none; raises `OutputError`."""
    wanted = [Path(name) for name in (html, svg) if name]
    there = [path for path in wanted if os.path.lexists(path)]
    if there and not overwrite:
        names = ", ".join(f"`{path}`" for path in there)
        raise OutputError(f"{names} exists", hint="give another name, or --overwrite")
    if html:
        _write(Path(html), page(facts, other))
    if svg:
        _write(Path(svg), picture(facts.weights))


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise OutputError(f"cannot write `{path}`: {error.strerror}") from error
