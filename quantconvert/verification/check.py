"""All checks of one folder, in order: structure, checksums, codes, values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import Checkpoint, Repo, load_checkpoint, reader_of
from quantconvert.checkpoint.ranges import Files, open_regular
from quantconvert.errors import CheckpointError, QuantConvertError, VerificationError, raise_all, some
from quantconvert.events import Reporter, silent
from quantconvert.factors import FACTORS, read_places
from quantconvert.families import find_family
from quantconvert.job import Limits, step_names
from quantconvert.methods import DEFAULT_METHOD, METHODS
from quantconvert.planning import Plan
from quantconvert.sources import Sources, find_sources
from quantconvert.sources.sites import scaled
from quantconvert.sources.steps import STEPS
from quantconvert.spans import spans
from quantconvert.text import counted
from quantconvert.verification.findings import Finding, Verification
from quantconvert.verification.place import Place
from quantconvert.verification.report import REPORT_NAME, read_report
from quantconvert.verification.structure import check_structure, check_sums
from quantconvert.verification.values import check_values

_NO_REPORT: dict[str, Any] = {}


def verify_folder(
    place: Place,
    repo: Repo | None,
    limits: Limits = Limits(),  # noqa: B008 (a value)
    plan: Plan | None = None,
    method: str | None = None,
    report: Reporter = silent,
    require_report: bool = False,
) -> Verification:
    """Structure, codes and, with a source, values of the checkpoint in `place`.

    plan: that of a conversion that is not in place yet. Without it the folder's report, where there is one, says by
    which method and steps it was made (`method` where there is none), and its checksums are compared. limits: what it
    may take. report: is told of progress. require_report: a missing report is a finding. Raises `CheckpointError` where
    there is no source.
    """
    findings: list[Finding] = []
    folder = place.folder
    found = check_structure(place, findings, is_ours=plan is not None)
    num_checksums = 0 if plan else check_sums(place, findings)
    if require_report and not plan and not num_checksums and not findings:
        findings.append(Finding("checksums", REPORT_NAME, "is missing: every conversion of ours leaves one"))
    named, steps = _recorded(folder, plan, findings)
    method = METHODS.find(method).name if method else named
    sources = _sources(repo, steps, folder, findings) if repo is not None else None
    checked = None
    if found:
        pair = (repo, sources) if repo is not None and sources else None
        checked = check_values(place, found[1], pair, limits, method, report)
        findings += checked.findings
    return Verification(
        location=place.repo.location,
        source=repo.location if repo else None,
        num_files=len(found[0].weight_files) if found else 0,
        num_tensors=len(found[0].tensors) if found else 0,
        num_checksums=num_checksums,
        num_equal=checked.num_equal if checked else 0,
        errors=tuple(checked.errors) if checked else (),
        findings=tuple(findings),
        method=method,
    )


def _recorded(folder: Path, plan: Plan | None, findings: list[Finding]) -> tuple[str | None, tuple[str, ...]]:
    """The method and the steps of a result; None for another tool's codes. Versions before this knew one method."""
    if plan is not None:
        return (plan.job.method if plan.job.operation == "convert" else None), plan.job.step_names
    try:
        value = read_report(folder)
    except (OSError, ValueError, RecursionError):
        return None, ()  # the checksums have said so
    if value is None:
        return None, ()
    job = value.get("job")
    job = job if isinstance(job, dict) else _NO_REPORT
    if job.get("operation", "convert") != "convert":  # its codes are those of its source, whoever made them
        return None, ()
    method, steps = str(job.get("method", DEFAULT_METHOD)), job.get("steps", [])
    if method not in METHODS:
        findings.append(Finding("checksums", REPORT_NAME, f"names a method that is not known here: `{method}`"))
        return None, ()
    named = step_names(str(job.get("rotate") or ""), tuple(map(str, steps)) if isinstance(steps, list) else ())
    strange = [name for name in named if name not in STEPS]
    if strange:
        findings.append(Finding("checksums", REPORT_NAME, f"names steps that are not known here: {some(strange)}"))
        return method, ()
    return method, named


def _sources(repo: Repo, steps: tuple[str, ...], folder: Path, findings: list[Finding]) -> Sources:
    """What is read of the source, with the steps and factors by which the result was made."""
    checkpoint = load_checkpoint(repo)
    family = find_family(checkpoint)
    refusals: list[QuantConvertError] = []
    sources = find_sources(checkpoint, family, reader_of(repo), refusals, steps)
    raise_all(refusals)
    try:
        places = {} if _has_factors(repo, checkpoint, folder) else read_places(folder)
    except CheckpointError as error:
        findings.append(Finding("checksums", FACTORS, error.message))
        return sources
    reads, unknown = scaled(sources.reads, family, checkpoint, places)
    if unknown:
        message = f"has {counted(len(unknown), 'vector')} without a place in the source: {some(unknown)}"
        findings.append(Finding("values", FACTORS, message))
    return replace(sources, reads=tuple(reads))


def _has_factors(repo: Repo, checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether the source's tensors have the result's factors already: it was repacked or dequantized from them."""
    path = folder / FACTORS
    theirs = next((file for file in checkpoint.side_files if file.path == FACTORS), None)
    if theirs is None or not path.is_file() or path.stat().st_size != theirs.nbytes:
        return False
    source = Files(repo)
    try:
        with open(path, "rb", opener=open_regular) as file:
            for begin, end in spans(0, theirs.nbytes, 1 << 20):
                part = bytearray(end - begin)
                source.read_into(FACTORS, memoryview(part), begin)
                if file.read(end - begin) != part:
                    return False
    finally:
        source.close()
    return True


def check_complete(verification: Verification, plan: Plan) -> None:
    """Every weight that the plan quantizes must have been found quantized; raises `VerificationError`."""
    expected = {task.source.name for task in plan.quantized if task.scheme}
    missing = expected - {error.name for error in verification.errors}
    if missing and verification.is_ok:
        raise VerificationError(f"{len(missing)} weights are not quantized in the result: {some(sorted(missing))}")


def raise_findings(verification: Verification) -> None:
    """All findings as one error, sorted by check."""
    if verification.is_ok:
        return
    count = len(verification.findings)
    lines = "".join(f"\n  {f.check}: `{f.where}` {f.message}" for f in verification.findings)
    raise VerificationError(
        f"verification of `{verification.location}` failed at {verification.failed}, {count} findings:{lines}"
    )
