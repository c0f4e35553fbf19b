"""What a conversion knows of the inputs of its weights: from use (`--statistics`), or from a bag of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UnsupportedError, UsageError, some
from quantconvert.factors import IMPORTANCES, STATISTICS, place_vectors
from quantconvert.families import Family
from quantconvert.job import Job
from quantconvert.methods import DEFAULT_METHOD, METHODS, Method
from quantconvert.planning.decision import Decision
from quantconvert.planning.knowledge import Knowledge
from quantconvert.planning.memory import execution_for
from quantconvert.planning.methods import lacking_moments
from quantconvert.planning.tasks import UNKNOWN, Known
from quantconvert.sources.steps.scale import Scale
from quantconvert.statistics import Statistics


def find_knowledge(
    job: Job,
    statistics: Statistics | None,
    decisions: Sequence[Decision],
    checkpoint: Checkpoint,
    family: Family | None,
    errors: list[QuantConvertError],
) -> Knowledge:
    """What method and factors need to know; refusals where there is no source of it are appended to `errors`."""
    method = METHODS.find(job.method)
    if statistics is not None:
        return _from_use(method, statistics, decisions, errors)
    if job.statistics is not None or (method.needs == "nothing" and job.smooth is None):
        return Knowledge()
    if method.needs == "moments":
        errors.append(lacking_moments(method))
        return Knowledge()
    return _from_bag(job, method, decisions, checkpoint, family, errors)


def _from_bag(
    job: Job,
    method: Method,
    decisions: Sequence[Decision],
    checkpoint: Checkpoint,
    family: Family | None,
    errors: list[QuantConvertError],
) -> Knowledge:
    from quantconvert.factors.room import bag_nbytes
    from quantconvert.factors.walk import bag_file, find_walk

    walk = find_walk({d.ref.name: d.ref for d in decisions}, family, checkpoint)
    if isinstance(walk, str):
        asked = f"--method {method.name}" if method.needs != "nothing" else "--smooth"
        text = f"{asked} needs the importances of inputs, which no bag of tokens finds here: {walk}"
        errors.append(UsageError(text, hint="--statistics FILE, made by quantconvert observe"))
        return Knowledge()
    needed, limit = bag_nbytes(walk, execution_for(job.limits)), job.memory_limit
    if needed > limit:
        text = f"a bag of tokens needs {needed} bytes: expected at most --memory-limit {limit}"
        errors.append(UnsupportedError(text, hint=f"--memory-limit {-(-needed // 10**6)}MB, or --statistics FILE"))
    file = bag_file(walk)
    places = {place.name: place for place in place_vectors(file, IMPORTANCES)}
    inputs = [readers for layer in walk.layers for readers, _ in layer.inputs]
    modules = {module: Known(importance=places[readers[0]]) for readers in inputs for module in readers}
    return Knowledge(modules, walk, file)


def _from_use(
    method: Method, statistics: Statistics, decisions: Sequence[Decision], errors: list[QuantConvertError]
) -> Knowledge:
    modules = {}
    for module in statistics.inputs:
        moments = statistics.moments(module) if method.needs == "moments" else None
        refs = (statistics.second_moment(module), moments, statistics.channel_max(module))
        modules[module] = Known(*(ref and ref._replace(file=STATISTICS) for ref in refs))
    quantized = [d.module for d in decisions if d.request]
    if method.needs == "moments" and quantized and not any(modules.get(m, UNKNOWN).moments for m in quantized):
        text = f"--method {method.name}: `{statistics.path}` holds no moments of the layers that are quantized"
        errors.append(UsageError(text, hint="quantconvert observe SRC STATS.safetensors --moments ..."))
    return Knowledge(modules)


def method_for(method: Method, known: Known) -> Method:
    """The method asked for, or where it would not know what it needs the default one."""
    if method.needs == "nothing":
        return method
    lacks = {"nothing": False, "importance": known.importance is None, "moments": known.moments is None}
    return METHODS[DEFAULT_METHOD] if lacks[method.needs] else method


def note_unknown(method: Method, knowledge: Knowledge, decisions: Sequence[Decision]) -> list[str]:
    """That some weights are quantized by the default method, and why."""
    if method.needs == "nothing":
        return []
    left = [d.module for d in decisions if d.request and method_for(method, knowledge.of(d.module)) is not method]
    if not left:
        return []
    return [f"--method {method.name}: nothing is known of the inputs of {len(left)} weights, which are rounded to "
            f"nearest: {some(left)}"]  # fmt: skip


def check_steps(method: Method, decisions: Sequence[Decision], errors: list[QuantConvertError]) -> None:
    """What is known is of inputs as the model has them: of steps, only factors can be reckoned with."""
    if method.needs == "nothing":
        return
    other = [d.module for d in decisions if d.request and any(not isinstance(step, Scale) for step in d.ref.steps)]
    if other:
        text = (
            f"--method {method.name} knows the inputs as they are, not as --rotate or --step turns them: {some(other)}"
        )
        errors.append(UsageError(text, hint=f"--method {DEFAULT_METHOD}"))
