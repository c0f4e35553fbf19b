"""The tasks of a plan into the files of its shards: prove what is there, have the rest done, watch the source."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from quantconvert.checkpoint import Repo, RepoFile
from quantconvert.checkpoint.ranges import Files, Version
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.events import Reporter
from quantconvert.planning import Plan
from quantconvert.run.dock import Dock
from quantconvert.run.executors import EXECUTORS, Build
from quantconvert.run.journal import Journal
from quantconvert.run.ledger import Ledger, one_at_a_time
from quantconvert.run.outlet import Sending, Witness
from quantconvert.run.part import ALL, Part
from quantconvert.run.spool import Spool


def execute(
    plan: Plan,
    source: Repo,
    folder: Path,
    journal: Journal,
    report: Reporter,
    sending: Sending | None = None,
    witness: Witness | None = None,
    part: Part = ALL,
) -> dict[str, str]:
    """Make every shard of `plan` complete in `folder`, by the executor that the job names; returns their sha256.

    sending: where each goes then, and those that are there. witness: sees each task.
    part: of the shards, where other processes make the rest.
    On errors and interruptions what was finished is journalled. Raises `CheckpointError` also where a file of the
    source is not what was planned, or changes before the end.
    """
    report = one_at_a_time(report)
    before = [_version(source, file) for file in plan.checkpoint.weight_files]
    for file, version in zip(plan.checkpoint.weight_files, before, strict=True):
        _check(file.path, file.version or Version(file.nbytes), version)
    _check_statistics(plan)
    ledger = Ledger(plan, folder, journal, report, sending.shipped if sending else None, witness, part)
    files = Files(source)
    try:
        with ExitStack() as stack:
            stack.enter_context(ledger.hashes.running(min(len(plan.shards), plan.execution.workers)))
            dock = stack.enter_context(Dock(ledger, sending.outlet, sending.basis).running()) if sending else None
            tasks = ledger.begin(None if isinstance(source, Spool) else files)
            if tasks:
                EXECUTORS.find(plan.job.limits.executor).run(Build(plan, source, folder), tasks, ledger, report)
            ledger.end()
            sums = ledger.hashes.finish()
            if dock is not None:
                dock.finish()
    except BaseException:
        with suppress(OutputError):
            ledger.flush()
        raise
    finally:
        files.close()
        ledger.close()
    for file, version in zip(plan.checkpoint.weight_files, before, strict=True):
        _check(file.path, version, _version(source, file))
    _check_statistics(plan)
    return {plan.shards[number].file: done.sha256 for number, done in ledger.shipped.items()} | sums


def _check_statistics(plan: Plan) -> None:
    """Raise `CheckpointError` where the file of `--statistics` is not the one that was planned with."""
    if plan.statistics is not None:
        plan.statistics.open().close()


def _version(source: Repo, file: RepoFile) -> Version:
    """What the file is now, by its name."""
    reader = source.open(file.path)
    try:
        return reader.version()
    finally:
        reader.close()


def _check(path: str, before: Version, now: Version) -> None:
    if before.matches(now):
        return
    fields = [
        f"{label} {old}, got {new}"
        for label, old, new in zip(_LABELS, before, now, strict=True)
        if None not in (old, new) and old != new
    ]
    raise CheckpointError(
        f"`{path}` of the source changed after it was planned: expected {', '.join(fields)}",
        hint="the result would be a mixture: convert again when nobody writes into the source",
    )


_LABELS = ("a size of", "a modification time of", "a change time of", "an etag of")
