"""What a verification has shown, as an in-toto statement that `cosign attest-blob` or `gh attestation` can sign.

Statement v1 (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md): `subject` is each file of the
result with its sha256, `predicate` the tool, the options, the source's files with theirs, and a verdict for each
weight. All digests are of bytes that were read for it, but those of large files on the Hub, which keeps each under its
sum. No time stands in it: the same files give the same statement.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import Repo, RepoFile, load_checkpoint
from quantconvert.errors import OutputError, UsageError
from quantconvert.job import Limits
from quantconvert.kernels import kernel_label
from quantconvert.methods import DEFAULT_METHOD, METHODS
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.verification.check import verify_folder
from quantconvert.verification.findings import TensorError, Verification
from quantconvert.verification.place import Place, sums_of
from quantconvert.verification.report import read_report
from quantconvert.version import __version__

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://github.com/quantconvert/quantconvert/blob/main/docs/attestation.md#v1"


def statement_of(place: Place, repo: Repo, found: Verification, limits: Limits) -> dict[str, Any]:
    """The statement on the result in `place`, made from `repo`, of which nothing wrong was found.

    Reads all files of both that are on this machine once more for their sha256, and another tool's codes to see which
    are the nearest. Raises `CheckpointError` and `OutputError`.
    """
    far = frozenset[str]()
    if found.method is None:  # what it would be found guilty of, had it promised rounding
        judged = verify_folder(place, repo, limits, method=DEFAULT_METHOD)
        far = frozenset(finding.where for finding in judged.findings)
    made = read_report(place.folder) or {}
    return {
        "_type": STATEMENT,
        "subject": _digests(place.repo, place.repo.files(), limits.workers),
        "predicateType": PREDICATE,
        "predicate": {
            "tool": {"name": "quantconvert", "version": __version__, "kernel": kernel_label()},
            "conversion": {
                "quantconvert_version": made.get("quantconvert_version"),
                "method": found.method,
                "options": made.get("job"),
                "plan_sha256": made.get("plan_sha256"),
            },
            "source": {
                "location": repo.location,
                "revision": repo.revision,
                "files": _digests(repo, load_checkpoint(repo).weight_files, limits.workers),
            },
            "verdict": {
                "result": "ok",
                "equal_tensors": found.num_equal,
                "weights": {error.name: _verdict(error, found.method, far) for error in found.errors},
            },
        },
    }


def check_place(file: str, has_source: bool) -> None:
    """Whether a statement can be made and written; raises `UsageError` or `OutputError`."""
    if not has_source:
        raise UsageError("--attest needs --source: what is attested is where a result comes from")
    if Path(file).exists():
        raise OutputError(f"`{file}` exists", hint="give another name, or remove it")


def write_statement(path: Path, statement: Mapping[str, Any]) -> None:
    """The statement as a file that was not there; whole, or not at all. Raises `OutputError`."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(statement, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.link(partial, path)
    except FileExistsError as error:
        raise OutputError(f"`{path}` exists", hint="give another name, or remove it") from error
    except OSError as error:
        raise OutputError(f"cannot write `{path}`: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _digests(repo: Repo, files: Iterable[RepoFile], workers: int) -> list[dict[str, Any]]:
    sums = sums_of(repo, sorted(file.path for file in files), workers)
    return [{"name": name, "digest": {"sha256": value}} for name, value in sums.items()]


def _verdict(error: TensorError, method: str | None, far: frozenset[str]) -> dict[str, Any]:
    """What can be said of one weight, honestly: another tool has promised nothing. far: modules with other codes."""
    if method is not None:
        text = f"derived from the source as {METHODS[method].words} promises"
    elif error.name.removesuffix(WEIGHT_SUFFIX) not in far:
        text = "codes are the nearest to the source's values"
    elif error.max_error < 1:
        text = f"codes are the nearest or beside them: at most {error.max_error:g} steps; rounded otherwise than here"
    else:
        text = f"codes are not the nearest: at most {error.max_error:g} steps; not derived by rounding"
    return {
        "scheme": error.scheme,
        "verdict": text,
        "max_error_steps": error.max_error,
        "relative_error": error.relative_error,
        "sqnr_db": error.sqnr,
    }
