"""The library: `plan`, `convert`, `finish`, `verify`, `repack`, `dequantize`, `observe`, `inspect`.

The command line is a shell on it. A plan imports nothing of what runs it, so that it is there at once; what each other
function needs it imports itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from quantconvert.checkpoint import Checkpoint, LocalFolder, Repo, load_checkpoint, reader_of
from quantconvert.checkpoint.files import is_pipeline as has_pipeline
from quantconvert.errors import UsageError
from quantconvert.events import Reporter, silent
from quantconvert.hub import checked_repo, open_repo
from quantconvert.job import Job, Limits
from quantconvert.lazy import load_torch
from quantconvert.options import (
    DEFAULT_DTYPE,
    Activations,
    CheckOptions,
    ConvertOptions,
    DequantizeWords,
    FinishOptions,
    HubOptions,
    JobOptions,
    LimitOptions,
    ObserveOptions,
    PlainDType,
    PlanOptions,
    PushOptions,
    RankOptions,
    RepackWords,
    ReportOptions,
    ShipOptions,
    SourceOptions,
    TranscodeOptions,
    VerifyOptions,
    check_values,
    read_group,
)
from quantconvert.planned import builder_of, planned
from quantconvert.planning import Plan, build_transcode
from quantconvert.run.part import ALL, Part

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.comparison import Comparison
    from quantconvert.conversion import Result, Target
    from quantconvert.inventory import Inventory
    from quantconvert.observation import Observation
    from quantconvert.pictures.facts import Facts
    from quantconvert.pipeline import PipelineResult
    from quantconvert.run.outlet import Published
    from quantconvert.streaming import Wish
    from quantconvert.verification import Verification

__all__ = [
    "check", "convert", "convert_pipeline", "convert_to_hub", "dequantize", "finish", "inspect", "is_pipeline",
    "iter_quantized", "observe", "plan", "push", "repack", "report", "verify",
]  # fmt: skip

Source = str | os.PathLike[str]


def plan(source: Source, out: Source | None = None, **options: Unpack[PlanOptions]) -> Plan:
    """Everything a conversion would do, from headers alone (with `target_bits` from the weights, too); nothing is
    written.

    source: a local folder or a Hub repository id (only headers are fetched). out: where the result would go; when
    given, it is checked too. options: see `quantconvert.options`. Raises `UsageError`, `CheckpointError`,
    `UnsupportedError`, `OutputError`, or one `Refusal` with all of them.
    """
    values = check_values(PlanOptions, options)
    job, repo = _job(values), _open(source, values)
    if out is None:
        return planned(repo, builder_of(repo, job))
    from quantconvert.conversion import make_plan

    return make_plan(repo, _folder(out), values.get("overwrite", False), builder_of(repo, job), _wish(values)).plan


def convert(source: Source, out: Source, *, report: Reporter = silent, **options: Unpack[ConvertOptions]) -> Result:
    """Convert `source` (a local folder or a Hub repository id) into the folder `out`.

    report: receives events (`quantconvert.events`). options: see `quantconvert.options`; with `verify` the result is
    checked against the source before it appears; raises `VerificationError` where it is wrong.
    When it is interrupted, `out` looks as before, and the same call continues with the tasks that are not done, unless
    `restart` discards them; a note on the exception says so. Raises what `plan` raises, and the same classes for what
    shows only in the data (NaN, a file that ends early, a full disk).
    With `shards` (`K/N`) only these are made, beside other processes that make the rest, and gathered in a hidden
    folder beside `out`; the same call without it finishes, and so does `finish`.
    """
    values = check_values(ConvertOptions, options)
    from quantconvert.conversion import as_part, run
    from quantconvert.run.asked import Asked

    job, repo, part = _job(values), _open(source, values), _part(values)
    target = _target(out, values, report)
    if part != ALL:
        target = as_part(target, part, Asked.of(source, repo, values))
    return run(repo, builder_of(repo, job, report, values.get("stream") is not True), target)


def finish(out: Source, *, report: Reporter = silent, **options: Unpack[FinishOptions]) -> Result:
    """Finish what calls of `convert` with `shards` have begun beside `out`, as their call without it would: source and
    options are those of the parts. What is there is proved, what is missing is made.

    Raises as `convert`, and `OutputError` where there is no part.
    """
    from quantconvert.run.asked import read_asked
    from quantconvert.run.staged import staging_folder

    values, folder = check_values(FinishOptions, options), _folder(out)
    asked = read_asked(staging_folder(folder), folder)
    return convert(asked.source, out, report=report, **{**asked.options, **values})


def convert_to_hub(source: Source, repo: str, *, report: Reporter = silent, **options: Unpack[ShipOptions]) -> Result:
    """Convert `source` into the Hub repository `repo`, which is made where there is none; nothing stays here.

    Each file of weights is sent to a staging branch as soon as it is complete, and removed; a source on the Hub comes
    by ranges (unless `stream` is False). One commit shows all in the end. The same call continues, from what is in the
    hidden folder in the current directory and, on another machine, from the staging branch. `overwrite` means nothing
    here. Raises as `convert` and `push`.
    """
    from quantconvert.conversion import run
    from quantconvert.publish import Staging, Target

    values = check_values(ShipOptions, options)
    shown = Target(checked_repo(repo), **_of_group(values, HubOptions))
    if values.get("executor", Limits().executor) != Limits().executor:
        raise UsageError("--executor: what goes to the Hub file by file is made by threads", hint="give OUT, then push")
    job, checkpoint = _job(values), _open(source, values)
    part = _part(values)
    suffix = "" if part == ALL else f"-{part.number}-of-{part.count}"
    work = Path(f".quantconvert-{repo.replace('/', '--')}{suffix}")
    target = replace(_target(work, values, report, ships=True), outlet=Staging(shown, report), part=part)
    result = run(checkpoint, builder_of(checkpoint, job, report, values.get("stream") is False), target)
    with suppress(OSError):
        work.rmdir()
    return result


def convert_pipeline(
    source: Source, out: Source, *, report: Reporter = silent, **options: Unpack[ConvertOptions]
) -> PipelineResult:
    """Convert a pipeline (a folder or a repository with `model_index.json`) into the new folder `out`:
    its components that a table knows (text encoders), or `components`, each as `convert` does; the rest is carried
    over.

    When it is interrupted, what is done is kept in a hidden folder beside `out`, and the same call continues. Raises as
    `convert`, for all components at once.
    """
    from quantconvert.pipeline import convert_pipeline as run_pipeline

    values = check_values(ConvertOptions, options)
    job, repo = _job(values), _open(source, values)
    asked = values.get("components", ())
    return run_pipeline(repo, lambda part: builder_of(part, job, report), _target(out, values, report), asked)


def is_pipeline(source: Source, **where: Unpack[SourceOptions]) -> bool:
    """Whether `source` is a pipeline, and no checkpoint itself."""
    values = check_values(SourceOptions, where)
    return "subfolder" not in values and has_pipeline(_open(source, values).files())


def repack(
    source: Source,
    out: Source,
    format: str,
    *,
    activations: Activations | None = None,
    report: Reporter = silent,
    **options: Unpack[TranscodeOptions],
) -> Result:
    """Write a quantized checkpoint in another layout, without touching a code, a scale or a zero point.

    Reads what we write, and integer AWQ, GPTQ and compressed-tensors checkpoints made by others. activations: the
    config says that the inputs of quantized layers are quantized too, per token, while the model runs: symmetric int8
    per channel becomes W8A8. Raises `UnsupportedError` where the layout cannot hold them; otherwise as `convert`.
    """
    values = check_values(TranscodeOptions, options)
    acting = None if activations is None else read_group(RepackWords)["activations"].checked(activations)
    job = Job.from_options({**_of_group(values, JobOptions), "format": format}, "repack", activations=acting)
    return _transcode(source, out, job, values, report)


def dequantize(
    source: Source,
    out: Source,
    dtype: PlainDType = DEFAULT_DTYPE,
    *,
    report: Reporter = silent,
    **options: Unpack[TranscodeOptions],
) -> Result:
    """Turn a quantized checkpoint back into a plain one: `(code - zero_point) * scale`, rounded once to `dtype`.

    Reads the same checkpoints as `repack`, GPTQ with `desc_act` too. Raises as `convert`.
    """
    checked = read_group(DequantizeWords)["dtype"].checked(dtype)
    values = check_values(TranscodeOptions, options)
    job = Job.from_options(_of_group(values, JobOptions), "dequantize", checked)
    return _transcode(source, out, job, values, report)


def _transcode(source: Source, out: Source, job: Job, values: Mapping[str, Any], report: Reporter) -> Result:
    from quantconvert.conversion import run

    repo = _open(source, values)

    def build(checkpoint: Checkpoint) -> Plan:
        return build_transcode(checkpoint, job, reader_of(repo), job.dtype)

    return run(repo, build, _target(out, values, report))


def iter_quantized(
    source: Source, *, tp_rank: int = 0, tp_size: int = 1, merged: bool = False, **options: Unpack[RankOptions]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one tensor-parallel rank, for engines that quantize while they load; nothing is written.

    Reads only the rank's slice of each quantized weight and quantizes it after sharding, so that scales and zero points
    have the rank's dimensions. Column-parallel layers (q/k/v, gate/up, experts' w1/w3) are split by out_features,
    row-parallel ones (o, down, w2) by in_features; key and value projections are replicated where there are more ranks
    than key/value heads. Tensors that are not quantized come whole. `format="rtn"` gives the plainest tensors.
    merged: layers that engines load as one (q/k/v, gate/up) are quantized as one matrix, the rank's shares one above
    the other, under the name that engines give it (`qkv_proj`); a scale per tensor is then that of the whole. Sets of
    which a member is missing stay apart, and biases keep their names.
    Refusals are raised before the first tensor, as in `plan`.
    """
    if not 0 <= tp_rank < tp_size:
        raise UsageError(f"tp_rank: expected 0 to {tp_size - 1}, got {tp_rank}")
    load_torch()
    from quantconvert.run.ranked import iter_rank

    values = check_values(RankOptions, options)
    job, repo = _job(values | {"tensor_parallel": tp_size}), _open(source, values)
    plan = planned(repo, builder_of(repo, job))
    repo.prepare(tuple(file.path for file in plan.checkpoint.weight_files))
    return iter_rank(plan, repo, tp_rank, tp_size, merged)


def verify(
    out: Source, source: Source | None = None, *, report: Reporter = silent, **options: Unpack[VerifyOptions]
) -> Verification:
    """Check a converted checkpoint: structure, the checksums that its conversion left, codes, and against `source`.

    out: a folder, or a Hub repository id. What is on the Hub and not in huggingface_hub's cache comes by ranges, a
    weight and its source at a time, and goes (`stream` False: into the cache first).

    With a source (a folder or a Hub repository id, as converted), what engines compute from every weight must lie as
    near to it as the method promises that quantconvert.json names (`method` says it where there is no such file;
    without either, half of a weight may be noise), and everything else must equal it. require_report: a missing
    quantconvert.json is a finding. attest: a file for an in-toto statement on what was shown, written where nothing was
    found. workers, memory_limit: as in `convert`. Findings are returned, not raised; raises `CheckpointError` where
    `out` is no folder or the source cannot be read, `OutputError` where `attest` exists or cannot be written.
    """
    from quantconvert.verification.check import verify_folder
    from quantconvert.verification.place import sides

    values = check_values(VerifyOptions, options)
    limits = _limits(values)
    text = os.fspath(out)
    result = open_repo(out, None) if text.count("/") == 1 or "://" in text else LocalFolder(Path(out))
    if "attest" in values:
        from quantconvert.attestation import check_place

        check_place(values["attest"], source is not None)
    origin = None if source is None else _open(source, values)
    how = {name: values[name] for name in ("method", "require_report") if name in values}
    with sides(result, origin, _wish(values)) as (place, repo):
        found = verify_folder(place, repo, limits, report=report, **how)
        if repo is not None and "attest" in values and found.is_ok:
            from quantconvert.attestation import statement_of, write_statement

            write_statement(Path(values["attest"]), statement_of(place, repo, found, limits))
    return found


def push(out: Source, repo: str, *, report: Reporter = silent, **options: Unpack[PushOptions]) -> Published:
    """Send a finished result to the Hub repository `repo`, which is made where there is none; what it holds is checked
    first as `verify` does without a source.

    All becomes visible in one commit to `branch` (or in a pull request, `create_pr`); until then weights lie on a
    staging branch, from which the same call continues, on another machine too. Tokens come from the environment or from
    huggingface_hub's login. Raises `VerificationError`, `UnsupportedError` for what is no result of ours, and
    `OutputError` for what the Hub refuses.
    """
    from quantconvert.publish import Target, publish
    from quantconvert.verification.check import raise_findings, verify_folder
    from quantconvert.verification.place import Place

    values = check_values(PushOptions, options)
    limits = _limits(values)
    folder = _folder(out)
    target = Target(checked_repo(repo), **_of_group(values, HubOptions))
    raise_findings(verify_folder(Place.of(folder), None, limits, report=report, require_report=True))
    return publish(folder, target, report)


def observe(
    source: Source, out: Source, *, report: Reporter = silent, **options: Unpack[ObserveOptions]
) -> Observation:
    """Run a plain checkpoint in transformers, on the CPU and in float32, and write statistics of what its linear layers
    read into the file `out`, for `statistics` of other calls.

    Needs the extra `engines`. It reads `text` (a file), or what it writes itself from its start token (`self_written`;
    the whole model is in memory meanwhile). One layer is in memory at a time where the model's layers can be run alone,
    else all of it; a note says so. The same call gives the same bytes on the same machine. No code of the source runs.
    Raises `UsageError`, `CheckpointError`, `UnsupportedError`, `OutputError`, or one `Refusal` with all of them.
    """
    from quantconvert.observation import Request
    from quantconvert.observation import observe as run_observation

    values = check_values(ObserveOptions, options)
    how = {name: values[name] for name in values if name not in ("text", *read_group(SourceOptions))}
    text = Path(values["text"]) if "text" in values else None
    return run_observation(_open(source, values), Request(_folder(out), text, **how), report)


def check(
    out: Source, source: Source | None = None, *, report: Reporter = silent, **options: Unpack[CheckOptions]
) -> Comparison:
    """Run a result in transformers beside its source, on the CPU and on the same text: KL divergence, agreement on the
    likeliest token and perplexity, or the cosine of embeddings.

    Needs the extra `engines`. source: None means the repository that quantconvert.json names, and without one the
    result alone. Raises `VerificationError` for what the engine does not load whole, in its words, `UnsupportedError`
    where there is too little memory, `CheckpointError`, `UsageError`.
    """
    from quantconvert.comparison import Request
    from quantconvert.comparison.run import check as run_check
    from quantconvert.verification.report import source_of

    values = check_values(CheckOptions, options)
    text = Path(values["text"]) if "text" in values else None
    if text is not None and not text.is_file():
        raise UsageError(f"--text: `{text}` is no file")
    request = Request(text, **{name: values[name] for name in ("tokens", "max_kl") if name in values})
    result, named = open_repo(out, None), None if source is None else (os.fspath(source), values.get("revision"))
    named = named or source_of(result)
    origin = None if named is None else open_repo(named[0], named[1], values.get("subfolder"))
    return run_check(result, origin, request, report)


def report(out: Source, **options: Unpack[ReportOptions]) -> Facts:
    """What a conversion did and where it lost what, from the result's quantconvert.json; reads no weight.

    out: a folder, or a Hub repository id. html: a file for the page; against: another result, shown beside it there.
    svg: a file for the map alone. Files must not be there (overwrite: are replaced). Raises `CheckpointError` where
    there is no quantconvert.json, or none of this version's, `OutputError` for the files.
    """
    from quantconvert.pictures.read import read_facts, write_pictures

    values = check_values(ReportOptions, options)
    facts = read_facts(open_repo(out, None))
    other = read_facts(open_repo(values["against"], None)) if "against" in values else None
    write_pictures(facts, other, values.get("html"), values.get("svg"), values.get("overwrite", False))
    return facts


def inspect(folder: Source, **where: Unpack[SourceOptions]) -> Inventory:
    """What a checkpoint holds, quantized or not: dtypes, sizes, schemes. Reads headers only."""
    from quantconvert.inventory import take_inventory

    return take_inventory(load_checkpoint(_open(folder, check_values(SourceOptions, where))))


def _of_group(values: Mapping[str, Any], group: type) -> dict[str, Any]:
    """Those of the values that are options of a group."""
    return {name: value for name, value in values.items() if name in read_group(group)}


def _limits(values: Mapping[str, Any]) -> Limits:
    return Job.from_options(_of_group(values, LimitOptions)).limits


def _job(values: Mapping[str, Any]) -> Job:
    return Job.from_options(_of_group(values, JobOptions))


def _open(source: Source, values: Mapping[str, Any]) -> Repo:
    return open_repo(source, values.get("revision"), values.get("subfolder"))


def _folder(out: Source) -> Path:
    """A folder to write to; an empty name, of a shell variable that is not set, would mean the current one."""
    if not os.fspath(out):
        raise UsageError("OUT is empty: expected a folder")
    return Path(out)


def _target(out: Source, values: Mapping[str, Any], report: Reporter, ships: bool = False) -> Target:
    from quantconvert.conversion import Target

    flags = {name: values.get(name, False) for name in ("overwrite", "restart", "verify")}
    return Target(_folder(out), report=report, wish=_wish(values, ships), **flags)


def _part(values: Mapping[str, Any]) -> Part:
    return Part.parse(values["shards"]) if "shards" in values else ALL


def _wish(values: Mapping[str, Any], ships: bool = False) -> Wish:
    from quantconvert.streaming import Wish

    return Wish(values.get("stream"), values.get("disk_limit"), ships)
