"""The library: `plan`, `convert`, `repack`, `dequantize`, `inspect`. The command line is a thin shell on these."""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from quantconvert.checkpoint import Checkpoint, LocalFolder, Repo, TensorRef, load_checkpoint
from quantconvert.checkpoint.files import INDEX_NAME
from quantconvert.errors import QuantConvertError, Refusal, UsageError, raise_all
from quantconvert.events import Finished, Note, Reporter, Started, silent
from quantconvert.hub import open_repo
from quantconvert.inventory import Inventory, take_inventory
from quantconvert.job import Job, JobOptions, StreamOptions
from quantconvert.planning import Plan, build_plan
from quantconvert.planning.transcode import PLAIN_TAGS, PlainDType, build_transcode
from quantconvert.run.journal import Journal
from quantconvert.run.output import OutputFolder, check_disk, check_output, check_unlocked

if TYPE_CHECKING:
    from torch import Tensor

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
    subfolder: str | None = None,
    overwrite: bool = False,
    **options: Unpack[JobOptions],
) -> Plan:
    """Everything a conversion would do, from headers alone; nothing is written.

    source: a local folder or a Hub repository id (only headers are fetched). out: where the result would go; when
    given, it is checked too. subfolder: the folder of the source that holds the model. options: see `JobOptions`.
    Raises `UsageError`, `CheckpointError`, `UnsupportedError`, `OutputError`, or one `Refusal` with all of them.
    """
    job = Job.from_options(options)
    repo = open_repo(source, revision, subfolder)
    return _plan(repo, None if out is None else Path(out), overwrite, _builder(repo, job))


def convert(
    source: Source,
    out: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[JobOptions],
) -> Result:
    """Convert `source` (a local folder or a Hub repository id) into the folder `out`.

    report: receives events (`quantconvert.events`). command: recorded in the model card. options: see `JobOptions`.
    When it is interrupted, `out` looks as before, and the same call continues with the tasks that are not done, unless
    `restart` discards them; a note on the exception says so. Raises what `plan` raises, and the same classes for what
    shows only in the data (NaN, a file that ends early, a full disk).
    """
    job = Job.from_options(options)
    repo = open_repo(source, revision, subfolder)
    return _run(repo, _builder(repo, job), _Target(Path(out), overwrite, restart, report, command))


def repack(
    source: Source,
    out: Source,
    format: str,
    *,
    overwrite: bool = False,
    restart: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[StreamOptions],
) -> Result:
    """Write a quantized checkpoint in another layout, without touching a code, a scale or a zero point.

    Reads what we write, and integer AWQ, GPTQ and compressed-tensors checkpoints made by others. Raises
    `UnsupportedError` where the layout cannot hold them; otherwise as `convert`.
    """
    job = Job.from_options({**options, "format": format})
    return _transcode(source, job, None, _Target(Path(out), overwrite, restart, report, command))


def dequantize(
    source: Source,
    out: Source,
    dtype: PlainDType = "bfloat16",
    *,
    overwrite: bool = False,
    restart: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[StreamOptions],
) -> Result:
    """Turn a quantized checkpoint back into a plain one: `(code - zero_point) * scale`, rounded once to `dtype`.

    Reads the same checkpoints as `repack`, GPTQ with `desc_act` too. Raises as `convert`.
    """
    if dtype not in PLAIN_TAGS:
        raise UsageError(f"--dtype: expected {', '.join(PLAIN_TAGS)}, got `{dtype}`")
    return _transcode(source, Job.from_options(options), dtype, _Target(Path(out), overwrite, restart, report, command))


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a result goes, what may be discarded there, whom to tell, and the command for the model card."""

    out: Path
    overwrite: bool
    restart: bool
    report: Reporter
    command: str | None


def _transcode(source: Source, job: Job, dtype: PlainDType | None, target: _Target) -> Result:
    repo = open_repo(source, None)

    def build(checkpoint: Checkpoint) -> Plan:
        return build_transcode(checkpoint, job, _small(repo), dtype)

    return _run(repo, build, target)


def iter_quantized(
    source: Source,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    revision: str | None = None,
    subfolder: str | None = None,
    **options: Unpack[JobOptions],
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one tensor-parallel rank, for engines that quantize while they load; nothing is written.

    Reads only the rank's slice of each quantized weight and quantizes it after sharding, so that scales and zero points
    have the rank's dimensions. Column-parallel layers (q/k/v, gate/up, experts' w1/w3) are split by out_features,
    row-parallel ones (o, down, w2) by in_features; key and value projections are replicated where there are more ranks
    than key/value heads. Tensors that are not quantized come whole. `format="rtn"` gives the plainest tensors.
    Refusals are raised before the first tensor, as in `plan`.
    """
    if not 0 <= tp_rank < tp_size:
        raise UsageError(f"tp_rank: expected 0 to {tp_size - 1}, got {tp_rank}")
    _load_torch()
    from quantconvert.run.ranked import iter_rank

    repo = open_repo(source, revision, subfolder)
    made = _plan(repo, None, False, _builder(repo, Job.from_options({**options, "tensor_parallel": tp_size})))
    root = repo.materialize(tuple(file.path for file in made.checkpoint.weight_files))
    return iter_rank(made, root, tp_rank, tp_size)


def inspect(folder: Source, *, revision: str | None = None, subfolder: str | None = None) -> Inventory:
    """What a checkpoint holds, quantized or not: dtypes, sizes, schemes. Reads headers only."""
    return take_inventory(load_checkpoint(open_repo(folder, revision, subfolder)))


Builder = Callable[[Checkpoint], Plan]


def _builder(repo: Repo, job: Job) -> Builder:
    return lambda checkpoint: build_plan(checkpoint, job, _small(repo), _find_nonfinite(checkpoint, repo, job))


def _small(repo: Repo) -> Callable[[TensorRef], bytes]:
    """Reads the bytes of a small tensor of `repo`."""
    return lambda ref: repo.read(ref.file, ref.offset, ref.nbytes)


def _run(repo: Repo, build: Builder, target: _Target) -> Result:
    wall, cpu = time.perf_counter(), time.process_time()
    made = _plan(repo, target.out, target.overwrite, build)
    for message in made.notes:
        target.report(Note("plan", message))
    folder = OutputFolder(target.out, target.report)
    try:
        folder.acquire()
        if not folder.is_done(made):
            raise_all(check_output(target.out, _path(repo), target.overwrite))
            _fill(folder, made, repo, target)
    finally:
        folder.release()
    target.report(Finished(str(target.out)))
    return Result(made, target.out, time.perf_counter() - wall, time.process_time() - cpu, _peak_rss())


def _path(repo: Repo) -> Path | None:
    return repo.path if isinstance(repo, LocalFolder) else None


def _plan(repo: Repo, out: Path | None, overwrite: bool, build: Builder) -> Plan:
    errors: list[QuantConvertError] = []
    if out is not None:
        check_unlocked(out)
        errors += check_output(out, _path(repo), overwrite)
    made = None
    try:
        with _no_garbage():
            made = build(load_checkpoint(repo))
    except Refusal as refusal:
        errors += refusal.errors
    except QuantConvertError as error:
        errors.append(error)
    if made is not None and out is not None:
        errors += check_disk(out, made.output_nbytes + SMALL_FILES_NBYTES + 100 * len(made.tasks))
    raise_all(errors)
    assert made is not None
    return made


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Planning makes hundreds of thousands of small values and no cycles; looking for cycles took a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_nonfinite(checkpoint: Checkpoint, repo: Repo, job: Job) -> Mapping[str, str] | None:
    """With --nan-policy keep, read every weight once before planning; otherwise nothing is read."""
    if job.nan_policy != "keep":
        return None
    _load_torch()
    from quantconvert.run.scan import find_nonfinite

    root = repo.materialize(tuple(file.path for file in checkpoint.weight_files))
    made = build_plan(checkpoint, job, _small(repo))
    return find_nonfinite([task.source for task in made.quantized], root, made.execution)


def _fill(folder: OutputFolder, made: Plan, repo: Repo, target: _Target) -> None:
    """Continue what the folder holds, or begin; on an error keep what the same command can continue."""
    journal = folder.resume(made, target.restart)
    try:
        _execute(made, repo, folder, journal, target)
    except BaseException as error:
        if journal.done and _may_pass(error):
            done = f"{len(journal.done)} of {len(made.tasks)} tasks are done and kept"
            error.add_note(f"{done}: the same command continues, --restart starts over")
        else:
            folder.abandon()
        raise
    finally:
        journal.close()


def _may_pass(error: BaseException) -> bool:
    """Whether the same command may get further: after anything but a complaint about the source's data."""
    return not isinstance(error, QuantConvertError) or isinstance(error.__cause__, OSError)


def _execute(made: Plan, repo: Repo, folder: OutputFolder, journal: Journal, target: _Target) -> None:
    _load_torch()
    from quantconvert.card import render_card
    from quantconvert.run.execute import ThreadExecutor

    checkpoint = made.checkpoint
    side = tuple(file.path for file in checkpoint.side_files)
    needed = (*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.rewritten_files)
    root = repo.materialize(tuple(file.path for file in needed))
    target.report(Started(len(made.tasks), checkpoint.nbytes))
    ThreadExecutor(made, root, folder.state, journal, target.report).run()
    for path in side:
        folder.copy(root, path)
    folder.write("README.md", render_card(made, target.command).encode())
    if made.index:
        folder.write(INDEX_NAME, _json(made.index))
    folder.write("config.json", _json(made.config))
    folder.commit()


def _load_torch() -> None:
    """Import torch without its complaint that NumPy is missing: neither of us needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch  # noqa: F401


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _peak_rss() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
