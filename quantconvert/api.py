"""The library: `plan`, `convert`, `verify`, `repack`, `dequantize`, `inspect`. The command line is a shell on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from quantconvert.checkpoint import Checkpoint, LocalFolder, Repo, load_checkpoint, reader_of
from quantconvert.conversion import Builder, Result, Target, make_plan, run
from quantconvert.errors import UsageError
from quantconvert.events import Reporter, silent
from quantconvert.hub import open_repo
from quantconvert.inventory import Inventory, take_inventory
from quantconvert.job import Job, JobOptions, StreamOptions
from quantconvert.lazy import load_torch
from quantconvert.planning import Plan, build_plan, build_transcode
from quantconvert.planning.transcode import PLAIN_TAGS, PlainDType
from quantconvert.verification import Verification
from quantconvert.verification.check import verify_folder

__all__ = ["Result", "convert", "dequantize", "inspect", "iter_quantized", "plan", "repack", "verify"]

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike[str]


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
    return make_plan(repo, None if out is None else Path(out), overwrite, _builder(repo, job))


def convert(
    source: Source,
    out: Source,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[JobOptions],
) -> Result:
    """Convert `source` (a local folder or a Hub repository id) into the folder `out`.

    report: receives events (`quantconvert.events`). command: recorded in the model card. options: see `JobOptions`.
    verify: check the result against the source before it appears; raises `VerificationError` where it is wrong.
    When it is interrupted, `out` looks as before, and the same call continues with the tasks that are not done, unless
    `restart` discards them; a note on the exception says so. Raises what `plan` raises, and the same classes for what
    shows only in the data (NaN, a file that ends early, a full disk).
    """
    job = Job.from_options(options)
    repo = open_repo(source, revision, subfolder)
    return run(repo, _builder(repo, job), Target(Path(out), overwrite, restart, verify, report, command))


def repack(
    source: Source,
    out: Source,
    format: str,
    *,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[StreamOptions],
) -> Result:
    """Write a quantized checkpoint in another layout, without touching a code, a scale or a zero point.

    Reads what we write, and integer AWQ, GPTQ and compressed-tensors checkpoints made by others. Raises
    `UnsupportedError` where the layout cannot hold them; otherwise as `convert`.
    """
    job = Job.from_options({**options, "format": format})
    return _transcode(source, job, None, Target(Path(out), overwrite, restart, verify, report, command))


def dequantize(
    source: Source,
    out: Source,
    dtype: PlainDType = "bfloat16",
    *,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    report: Reporter = silent,
    command: str | None = None,
    **options: Unpack[StreamOptions],
) -> Result:
    """Turn a quantized checkpoint back into a plain one: `(code - zero_point) * scale`, rounded once to `dtype`.

    Reads the same checkpoints as `repack`, GPTQ with `desc_act` too. Raises as `convert`.
    """
    if dtype not in PLAIN_TAGS:
        raise UsageError(f"--dtype: expected {', '.join(PLAIN_TAGS)}, got `{dtype}`")
    target = Target(Path(out), overwrite, restart, verify, report, command)
    return _transcode(source, Job.from_options(options), dtype, target)


def _transcode(source: Source, job: Job, dtype: PlainDType | None, target: Target) -> Result:
    repo = open_repo(source, None)

    def build(checkpoint: Checkpoint) -> Plan:
        return build_transcode(checkpoint, job, reader_of(repo), dtype)

    return run(repo, build, target)


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
    load_torch()
    from quantconvert.run.ranked import iter_rank

    repo = open_repo(source, revision, subfolder)
    made = make_plan(repo, None, False, _builder(repo, Job.from_options({**options, "tensor_parallel": tp_size})))
    repo.prepare(tuple(file.path for file in made.checkpoint.weight_files))
    return iter_rank(made, repo, tp_rank, tp_size)


def verify(
    out: Source,
    source: Source | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    require_report: bool = False,
    method: str | None = None,
    workers: int = 0,
    memory_limit: int | str = "2GB",
    report: Reporter = silent,
) -> Verification:
    """Check a converted checkpoint: structure, the checksums that its conversion left, codes, and against `source`.

    With a source (a folder or a Hub repository id, as converted), what engines compute from every weight must lie as
    near to it as the method promises that quantconvert.json names (`method` says it where there is no such file;
    without either, half of a weight may be noise), and everything else must equal it. require_report: a missing
    quantconvert.json is a finding. workers, memory_limit: as in `convert`. Findings are returned, not raised;
    raises `CheckpointError` where `out` is no folder or the source cannot be read.
    """
    limits = Job.from_options({"workers": workers, "memory_limit": memory_limit}).limits
    folder = Path(out)
    LocalFolder(folder)
    repo = None
    if source is not None:
        repo = open_repo(source, revision, subfolder)
        repo.prepare(tuple(file.path for file in load_checkpoint(repo).weight_files))
    return verify_folder(folder, repo, limits, method=method, report=report, require_report=require_report)


def inspect(folder: Source, *, revision: str | None = None, subfolder: str | None = None) -> Inventory:
    """What a checkpoint holds, quantized or not: dtypes, sizes, schemes. Reads headers only."""
    return take_inventory(load_checkpoint(open_repo(folder, revision, subfolder)))


def _builder(repo: Repo, job: Job) -> Builder:
    return lambda checkpoint: build_plan(checkpoint, job, reader_of(repo), _find_nonfinite(checkpoint, repo, job))


def _find_nonfinite(checkpoint: Checkpoint, repo: Repo, job: Job) -> Mapping[str, str] | None:
    """With --nan-policy keep, read every weight once before planning; otherwise nothing is read."""
    if job.nan_policy != "keep":
        return None
    load_torch()
    from quantconvert.run.scan import find_nonfinite

    repo.prepare(tuple(file.path for file in checkpoint.weight_files))
    made = build_plan(checkpoint, job, reader_of(repo))
    return find_nonfinite([task.source for task in made.quantized], repo, made.execution)
