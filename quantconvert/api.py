"""The library: `plan`, `convert`, `inspect`. The command line is a thin shell on these three."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from quantconvert.checkpoint import Checkpoint, LocalFolder, Repo, load_checkpoint
from quantconvert.checkpoint.files import INDEX_NAME
from quantconvert.errors import QuantConvertError, Refusal, raise_all
from quantconvert.events import Finished, Note, Reporter, Started, silent
from quantconvert.hub import open_repo
from quantconvert.inventory import Inventory, take_inventory
from quantconvert.job import Job, JobOptions
from quantconvert.planning import Plan, build_plan
from quantconvert.run.output import OutputFolder, check_disk, check_output

if TYPE_CHECKING:
    from collections.abc import Mapping

Source = str | os.PathLike[str]
# What a conversion writes beside shards and side files (index, config, card): an allowance for the disk check.
SMALL_FILES_NBYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did: the plan it followed, where the result is, and what it took.

    `peak_rss_nbytes` is the largest resident memory of this process so far, interpreter and torch included.
    """

    plan: Plan
    out: Path
    seconds: float
    cpu_seconds: float
    peak_rss_nbytes: int


def plan(
    source: Source,
    out: Source | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    **options: Unpack[JobOptions],
) -> Plan:
    """Everything a conversion would do, from headers alone; nothing is written.

    source: a local folder or a Hub repository id (only headers are fetched). out: where the result would go; when
    given, it is checked too. options: see `JobOptions`. Raises `UsageError`, `CheckpointError`, `UnsupportedError`,
    `OutputError`, or one `Refusal` with all of them.
    """
    job = Job.from_options(options)
    return _plan(open_repo(source, revision), job, None if out is None else Path(out), overwrite)


def convert(
    source: Source,
    out: Source,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[JobOptions],
) -> Result:
    """Convert `source` (a local folder or a Hub repository id) into the folder `out`.

    report: receives events (`quantconvert.events`). command: recorded in the model card. options: see `JobOptions`.
    On any error, and on KeyboardInterrupt, `out` is left as it was. Raises what `plan` raises, and the same classes
    for what shows only in the data (NaN, a file that ends early, a full disk).
    """
    wall, cpu = time.perf_counter(), time.process_time()
    job = Job.from_options(options)
    repo, target = open_repo(source, revision), Path(out)
    made = _plan(repo, job, target, overwrite)
    for message in made.notes:
        report(Note("plan", message))
    _execute(made, repo, target, report, command)
    report(Finished(str(target)))
    return Result(made, target, time.perf_counter() - wall, time.process_time() - cpu, _peak_rss())


def inspect(folder: Source, *, revision: str | None = None) -> Inventory:
    """What a checkpoint holds, quantized or not: dtypes, sizes, schemes. Reads headers only."""
    return take_inventory(load_checkpoint(open_repo(folder, revision)))


def _plan(repo: Repo, job: Job, out: Path | None, overwrite: bool) -> Plan:
    errors: list[QuantConvertError] = []
    if out is not None:
        errors += check_output(out, repo.path if isinstance(repo, LocalFolder) else None, overwrite)
    made = None
    try:
        checkpoint = load_checkpoint(repo)
        made = build_plan(checkpoint, job, _find_nonfinite(checkpoint, repo, job))
    except Refusal as refusal:
        errors += refusal.errors
    except QuantConvertError as error:
        errors.append(error)
    if made is not None and out is not None:
        errors += check_disk(out, made.output_nbytes + SMALL_FILES_NBYTES + 100 * len(made.tasks))
    raise_all(errors)
    assert made is not None
    return made


def _find_nonfinite(checkpoint: Checkpoint, repo: Repo, job: Job) -> Mapping[str, str] | None:
    """With --nan-policy keep, read every weight once before planning; otherwise nothing is read."""
    if job.nan_policy != "keep":
        return None
    from quantconvert.run.scan import find_nonfinite

    root = repo.materialize(tuple(file.path for file in checkpoint.weight_files))
    candidates = build_plan(checkpoint, job).quantized
    return find_nonfinite([task.source for task in candidates], root)


def _execute(made: Plan, repo: Repo, out: Path, report: Reporter, command: str | None) -> None:
    from quantconvert.card import render_card
    from quantconvert.run.execute import ThreadExecutor

    checkpoint = made.checkpoint
    side = tuple(file.path for file in checkpoint.side_files)
    root = repo.materialize((*(file.path for file in checkpoint.weight_files), *side))
    report(Started(len(made.tasks), checkpoint.nbytes))
    folder = OutputFolder(out)
    folder.prepare()
    try:
        ThreadExecutor(made, root, folder.state, report).run()
        for path in side:
            folder.copy(root, path)
        folder.write("README.md", render_card(made, command).encode())
        if made.index:
            folder.write(INDEX_NAME, _json(made.index))
        folder.write("config.json", _json(made.config))
        folder.commit()
    except BaseException:
        folder.abandon()
        raise


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _peak_rss() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
