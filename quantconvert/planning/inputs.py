"""What a plan takes from statistics of the model's inputs (`--statistics`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError, UsageError, some
from quantconvert.families import FusedSet, fused_groups
from quantconvert.job import Job
from quantconvert.planning.decision import Decision
from quantconvert.sources import Sources
from quantconvert.sources.steps.scale import Scale
from quantconvert.statistics import OBSERVE, Statistics, check_fit, check_weights, open_statistics

# The largest number that float16 holds, times the codes on one side of zero.
_FLOAT16_MAX = 65504 * 127.5


def statistics_of(
    job: Job,
    checkpoint: Checkpoint,
    sources: Sources,
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
) -> Statistics | None:
    """The statistics that the job names, if they are of this checkpoint; else None, and why is in `errors`."""
    if job.statistics is None:
        return None
    try:
        statistics = open_statistics(Path(job.statistics))
    except CheckpointError as error:
        errors.append(error)
        return None
    widths = {read.module: read.shape[1] for read in sources.reads if len(read.shape) == 2}
    before = len(errors)
    check_fit(statistics, checkpoint.model_type, widths, errors)
    if len(errors) == before:
        check_weights(statistics, checkpoint.tensors, read, errors)
    return statistics if len(errors) == before else None


def input_maxima(
    job: Job,
    statistics: Statistics | None,
    decisions: Sequence[Decision],
    fused: Sequence[FusedSet],
    errors: list[QuantConvertError],
) -> dict[str, float]:
    """max |x| of each module whose activations get a stored scale; one number for modules that engines load as one."""
    static = [d for d in decisions if d.request and d.request.static]
    if not static or (job.statistics is not None and statistics is None):
        return {}
    example = some([d.module for d in static])
    if statistics is None:
        message = f"W8A8_STATIC stores the scale of each layer's input, which --statistics must tell: {example}"
        errors.append(UsageError(message, hint=f"{OBSERVE}, then --statistics STATS.safetensors; or the dynamic W8A8"))
        return {}
    _check_static(static, statistics, errors)
    maxima = {d.module: found for d in static if (found := _max(statistics, d.module)) is not None}
    for _, members in fused_groups(maxima, fused):
        largest = max(maxima[module] for module in members)
        maxima |= dict.fromkeys(members, largest)
    return maxima


def _max(statistics: Statistics, module: str) -> float | None:
    ref = statistics.max(module)
    return None if ref is None else statistics.values(ref)[0]


def _check_static(static: Sequence[Decision], statistics: Statistics, errors: list[QuantConvertError]) -> None:
    unknown = [d.module for d in static if statistics.max(d.module) is None]
    if unknown:
        errors.append(
            UnsupportedError(
                f"--statistics `{statistics.path}` do not have the inputs of {len(unknown)} modules that W8A8_STATIC "
                f"is asked for: {some(unknown)}",
                hint="--rule 'PATTERN=W8A8' finds the scales of these while the model runs",
            )
        )
    changed = [d.module for d in static if any(not isinstance(step, Scale) for step in d.ref.steps)]
    if changed:
        errors.append(
            UnsupportedError(
                f"W8A8_STATIC beside steps: the inputs of {len(changed)} modules would have other ranges than those "
                f"that were observed: {some(changed)}",
                hint="the dynamic W8A8, or no steps",
            )
        )
    narrow = [d.module for d in static if d.ref.dtype == "F16" and (_max(statistics, d.module) or 0) > _FLOAT16_MAX]
    if narrow:
        message = f"float16 does not hold the scales of {len(narrow)} inputs: {some(narrow)}"
        errors.append(UnsupportedError(message, hint="--rule 'PATTERN=W8A8', or a bfloat16 source"))


# Fewer tokens than this tell little of moments and maxima.
FEW_TOKENS = 1024


def note_statistics(statistics: Statistics | None, decisions: Sequence[Decision], used: bool) -> list[str]:
    """That nothing reads the statistics, or that they are of little. used: by a method or by factors."""
    if statistics is None:
        return []
    if not used and not any(d.request and d.request.static for d in decisions):
        return ["--statistics: nothing here reads them: neither --method, --equalize, --smooth nor W8A8_STATIC"]
    if statistics.num_tokens < FEW_TOKENS:
        return [f"--statistics are of {statistics.num_tokens} tokens alone: observe more (--tokens {16 * FEW_TOKENS})"]
    return []
