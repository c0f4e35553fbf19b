"""One conversion from plan to finished folder: continue or begin, write, verify, report, move into place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from quantconvert.checkpoint import LocalFolder, Repo
from quantconvert.checkpoint.files import INDEX_NAME, PICTURE
from quantconvert.checkpoint.ranges import Files, Wrong
from quantconvert.errors import (
    OutputError,
    QuantConvertError,
    Refusal,
    raise_all,
    some,
)
from quantconvert.events import Finished, Note, Reporter
from quantconvert.factors.summary import Summary, summarize
from quantconvert.lazy import load_torch
from quantconvert.machine import peak_rss_nbytes
from quantconvert.planned import Builder, planned
from quantconvert.planning import Plan
from quantconvert.run.asked import Asked
from quantconvert.run.execute import execute
from quantconvert.run.first import first_needs_torch, first_pass
from quantconvert.run.folder import (
    OutputFolder,
    State,
    check_output,
    check_place,
    check_unlocked,
    differences,
    exists_error,
    identity,
    read_proof,
    read_state,
)
from quantconvert.run.journal import Journal
from quantconvert.run.outlet import FIRST, Outlet, Published, Sending, Shipped
from quantconvert.run.part import ALL, Part
from quantconvert.run.phases import opening, tasks_started, without_repeats
from quantconvert.run.spool import Spool
from quantconvert.run.staged import FolderOutlet, adopt, gathered, remove_staging, staging_folder
from quantconvert.run.work import needs_torch
from quantconvert.streaming import WHOLE, Way, Wish, needed, way_of
from quantconvert.text import counted
from quantconvert.verification.check import check_complete, raise_findings, verify_folder
from quantconvert.verification.findings import Finding, Quality, TensorError, Verification
from quantconvert.verification.place import Place
from quantconvert.verification.report import (
    REPORT_NAME,
    Tensors,
    hash_files,
    read_report,
    report_bytes,
    report_of,
    sha256_of,
    tensors_of,
)
from quantconvert.verification.structure import check_sums
from quantconvert.verification.witness import Witness
from quantconvert.version import __version__

# Where ranges of the source lie, in the hidden folder.
SPOOL = ".source"
# What a conversion writes beside shards and side files, however few tensors there are.
SMALL_FILES_NBYTES = 1_000_000
# And for each task: what the journal keeps of it, and a line of the report.
TASK_NBYTES = 100 + 350


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did: the plan it followed, where the result is, and what it took.

    `peak_rss_nbytes` is the largest resident memory of this process so far, interpreter included. `part`: of the
    shards, where that is not all: nothing is shown then.
    """

    plan: Plan
    out: Path
    seconds: float
    cpu_seconds: float
    peak_rss_nbytes: int
    verification: Verification | None = None
    quality: Quality | None = None
    factors: Summary | None = None
    published: Published | None = None
    part: Part = ALL


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found out about its result."""

    verification: Verification | None = None
    quality: Quality | None = None
    factors: Summary | None = None
    published: Published | None = None


class Planned(NamedTuple):
    """A plan without a refusal, and how its source comes."""

    plan: Plan
    way: Way


@dataclass(frozen=True, slots=True)
class Target:
    """Where a result goes, what may be discarded there, whether to verify it, and whom to tell.

    outlet: takes the shards as they are complete, and shows the result in the end; nothing stays in `out`. part: which
    shards are made; others make the rest, and nothing is shown.
    """

    out: Path
    overwrite: bool
    restart: bool
    verify: bool
    report: Reporter
    wish: Wish = WHOLE
    outlet: Outlet | None = None
    part: Part = ALL


def run(repo: Repo, build: Builder, target: Target) -> Result:
    """Plan, then make the result in `target.out`, continuing what an interrupted run left there.

    Raises what planning raises, `CheckpointError` and `UnsupportedError` for what shows only in the data, `OutputError`
    for the place, `VerificationError` where the result was to be verified and is wrong.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    plan, way = make_plan(repo, target.out, target.overwrite, build, target.wish)
    for message in plan.notes:
        target.report(Note("plan", message))
    finished = read_state(target.out) is State.DONE
    complete = finished and is_result(target.out, plan)
    folder, outcome = OutputFolder(target.out, target.report), Outcome()
    try:
        folder.acquire()
        if finished:
            folder.tidy()
        if complete:
            _check_done(target.out)
            target.report(Note("resume", f"`{target.out}` is already complete: a run of this command ended there"))
        else:
            raise_all(check_output(target.out, _path(repo), target.overwrite))
            outcome = _fill(folder, plan, repo, way, target)
    finally:
        folder.release()
    target.report(Finished(str(target.out)))
    took = time.perf_counter() - wall, time.process_time() - cpu
    found, quality = outcome.verification, outcome.quality
    rss, factors = peak_rss_nbytes(), outcome.factors
    return Result(plan, target.out, *took, rss, found, quality, factors, outcome.published, target.part)


def as_part(target: Target, part: Part, asked: Asked) -> Target:
    """Where a part of what goes to `target` is made, and gathered; raises `OutputError` for `target`."""
    raise_all(check_output(target.out, None, target.overwrite))
    staging = staging_folder(target.out)
    place = staging / f"part-{part.number}-of-{part.count}"
    return replace(target, out=place, overwrite=False, outlet=FolderOutlet(staging, asked), part=part)


def is_result(out: Path, plan: Plan) -> bool:
    """Whether the finished conversion in `out`, of which the hidden folder is left, is the one of `plan`.

    Its proof says so; a kill may have left none, and then its report does, if no file of the source is younger.
    """
    proof = read_proof(out)
    if proof is not None:
        return not differences(proof, identity(plan))
    try:
        report, written = read_report(out), (out / REPORT_NAME).stat().st_mtime_ns
    except (OSError, ValueError):
        return False
    if report is None or report.get("quantconvert_version") != __version__:
        return False
    versions = [file.version for file in (*plan.checkpoint.weight_files, *plan.checkpoint.side_files)]
    older = all(version is None or (version.mtime_ns or 0) < written for version in versions)
    source = report.get("source")
    same = isinstance(source, dict) and source.get("revision") == plan.checkpoint.revision
    return older and same and report.get("plan_sha256") == plan.digest


def _check_done(out: Path) -> None:
    """A run that was stopped after its last move is taken for done only if its files are still what it wrote."""
    findings: list[Finding] = []
    check_sums(Place.of(out), findings)
    if findings:
        wrong = some([finding.where for finding in findings])
        raise OutputError(f"output `{out}` was changed after the conversion: {wrong}", hint="--overwrite makes it anew")


def _path(repo: Repo) -> Path | None:
    return repo.path if isinstance(repo, LocalFolder) else None


def make_plan(repo: Repo, out: Path, overwrite: bool, build: Builder, wish: Wish = WHOLE) -> Planned:
    """The plan by `build`, and every refusal about it and about the folder `out` at once."""
    way = Way()
    errors: list[QuantConvertError] = []
    check_unlocked(out)
    errors += check_place(out)
    finished = not errors and read_state(out) is State.DONE
    errors = errors or check_output(out, _path(repo), overwrite, finished)
    usable, plan = not errors, None
    try:
        plan = planned(repo, build)
    except Refusal as refusal:
        errors += refusal.errors
    except QuantConvertError as error:
        errors.append(error)
    if plan is not None and usable and not (finished and is_result(out, plan)):
        errors += [exists_error(out)] if finished and not overwrite else []
        small = plan.scratch_nbytes + _small_nbytes(plan) + _importances_nbytes(plan)
        way = way_of(plan, repo, out, wish, small + wish.ships * sum(f.nbytes for f in plan.checkpoint.side_files))
        errors += way.errors
    raise_all(errors)
    assert plan is not None
    return Planned(plan, way)


def _small_nbytes(plan: Plan) -> int:
    """Room for what a conversion writes beside shards and side files: index, config, card, picture, report, journal."""
    return SMALL_FILES_NBYTES + TASK_NBYTES * len(plan.tasks)


def _importances_nbytes(plan: Plan) -> int:
    """What a bag of tokens leaves on the disk until the end."""
    return plan.knowledge.file.nbytes if plan.knowledge and plan.knowledge.file else 0


def _fill(folder: OutputFolder, plan: Plan, repo: Repo, way: Way, target: Target) -> Outcome:
    """Continue what the folder holds, or begin; on an error keep what the same command can continue."""
    side = sum(file.nbytes for file in plan.checkpoint.side_files)
    journal = folder.resume(plan, target.restart, _small_nbytes(plan) + side)
    spool = None
    try:
        if way.limit is not None:
            repo = spool = Spool(repo, plan.checkpoint.weight_files, folder.state / SPOOL, way.limit)
        return _execute(plan, repo, folder, journal, target)
    except BaseException as error:
        if spool is not None:
            spool.remove()
        if journal.done and _may_pass(error) and folder.is_there:
            done = f"{len(journal.done)} of {len(plan.tasks)} tasks are done and kept"
            error.add_note(f"{done}: the same command continues, --restart starts over")
        else:
            folder.abandon()
        raise
    finally:
        journal.close()


def _may_pass(error: BaseException) -> bool:
    """Whether the same command may get further: after anything but a complaint about the source's data."""
    return not isinstance(error, QuantConvertError) or error.__cause__ is not None or isinstance(error, Wrong)


def _execute(plan: Plan, repo: Repo, folder: OutputFolder, journal: Journal, target: Target) -> Outcome:
    report, is_begun = without_repeats(target.report), bool(journal.done)
    report(opening(plan, is_begun))
    if first_needs_torch(plan) or needs_torch(plan.tasks):
        load_torch()

    repo.prepare(needed(plan))
    sending = _first(plan, repo, folder, journal, target, report)
    report(tasks_started(plan))
    witness = Witness(plan, repo) if target.verify and (target.outlet or isinstance(repo, Spool)) else None
    sums = execute(plan, repo, folder.state, journal, report, sending, witness, target.part)
    if target.part != ALL:
        folder.clear()
        return Outcome()
    done = journal.done.items()
    noises = {plan.tasks[i].source.name: result.noise for i, result in done if result.noise is not None}
    errors = {name: TensorError.of(name, "", 0.0, *noise) for name, noise in noises.items()}
    quality = Quality.of(errors.values())
    tensors = tensors_of(plan, errors, noises)
    _write_small_files(plan, repo, folder, quality, tensors)
    verification = None
    if target.verify:
        seen = witness.outcome(errors) if witness else None
        place, limits = Place.of(folder.state), plan.job.limits
        verification = seen or verify_folder(place, repo, limits, plan, report=target.report)
        check_complete(verification, plan)
        raise_findings(verification)
    if isinstance(repo, Spool):
        repo.remove()
    factors = summarize(folder.state, plan.factors) if plan.factors else None
    published = _show(plan, folder, target, sums, tensors, factors)
    return Outcome(verification, quality, factors, published)


def _first(
    plan: Plan, repo: Repo, folder: OutputFolder, journal: Journal, target: Target, report: Reporter
) -> Sending | None:
    """The first pass, unless other processes have it, and what these have made already."""
    local, is_begun = None if target.outlet else gathered(folder.out), bool(journal.done)
    outlet = target.outlet or local
    shipped = outlet.begin(plan, target.restart) if outlet else {}
    if outlet and not is_begun:
        outlet.recall(folder.state)
    first_pass(plan, repo, folder.state, is_begun, report)
    if outlet is None:
        return None
    basis = _basis(folder.state)
    good = {number: done for number, done in shipped.items() if _counts(done, basis, target)}
    if local:
        adopt(plan, local, good, folder.state, journal)
    else:
        outlet.keep(folder.state)
    left = sum(not journal.done.keys() >= set(tasks) for tasks in plan.by_shard) if local else 0
    if shipped or left:
        words = "by other processes" if local else "there already"
        more = f"; {len(shipped) - len(good)} more are not as this run makes them" if len(good) < len(shipped) else ""
        more += f"; {left} of {len(plan.shards)} are missing, and made now" if left else ""
        report(Note("resume", f"continuing: {counted(len(good), 'shard')} {words}{more}"))
    return Sending(outlet, good, basis) if target.outlet else None


def _counts(done: Shipped, basis: str, target: Target) -> bool:
    """Whether a shard need not be made again: it was made with the same factors and, where it goes elsewhere and this
    run verifies, somebody has compared it.
    """
    seen = not (target.outlet and target.verify) or all(result.seen for result in done.results.values())
    return done.basis == basis and seen


def _show(
    plan: Plan,
    folder: OutputFolder,
    target: Target,
    sums: Mapping[str, str],
    tensors: Tensors,
    factors: Summary | None,
) -> Published | None:
    """The report, and then everything in its place."""
    from quantconvert.card import command_of

    # there may be a report of an interrupted commit
    small = [path for path in folder.files if path != REPORT_NAME and path not in sums]
    files = {**sums, **hash_files(folder.state, small, plan.execution.workers)}
    folder.write(REPORT_NAME, report_bytes(report_of(plan, tensors, files, factors, command_of(plan))))
    if target.outlet:
        published = target.outlet.show(folder.state, [*small, REPORT_NAME], sums)
        folder.clear()
        return published
    folder.commit()
    remove_staging(folder.out)
    return None


def _basis(state: Path) -> str:
    """The sum of what the first pass has found."""
    found = [path for name in FIRST if (path := state / name).is_file()]
    return hashlib.sha256("".join(sha256_of(path) for path in found).encode()).hexdigest()


def _write_small_files(plan: Plan, repo: Repo, folder: OutputFolder, quality: Quality | None, tensors: Tensors) -> None:
    """Side files, card with its picture, index and config, for which room was kept."""
    from quantconvert.card import render_card

    folder.use_reserve()
    files = Files(repo)
    try:
        for file in plan.checkpoint.side_files:
            folder.copy(files.reader(file.path), file.path)
    finally:
        files.close()
    folder.write("README.md", render_card(plan, quality).encode())
    if quality is not None:
        from quantconvert.pictures.facts import weights_of
        from quantconvert.pictures.svg import picture

        folder.write(PICTURE, picture(weights_of(tensors)).encode())
    if plan.index:
        folder.write(INDEX_NAME, _json(plan.index))
    folder.write("config.json", _json(plan.config))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
