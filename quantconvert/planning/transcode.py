"""Plans that start from a quantized checkpoint: another layout for the same codes, or plain weights again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.dtypes import nbytes_of
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all, some
from quantconvert.families import Classifier
from quantconvert.job import Job
from quantconvert.layouts import Layout, Selection, get_layout
from quantconvert.layouts.base import all_caveats
from quantconvert.options import PlainDType
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.planning.account import check_accounts
from quantconvert.planning.build import loads_in_transformers
from quantconvert.planning.decision import LINEAR_REASONS
from quantconvert.planning.memory import COPY_CHUNK_NBYTES, check_memory, cut, execution_for, read_multiple
from quantconvert.planning.place import Promise, place, promised, unchanged
from quantconvert.planning.plan import Execution, Operation, Output, Plan, Task
from quantconvert.schemes import Scheme
from quantconvert.sources import Source, Sources, Weight, find_sources
from quantconvert.sources.find import METHODS

PLAIN = "plain"
PLAIN_TAGS: dict[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def build_transcode(
    checkpoint: Checkpoint, job: Job, read: Callable[[TensorRef], bytes], dtype: PlainDType | None = None
) -> Plan:
    """The plan of `repack` (to `job.format`) or, with a `dtype`, of `dequantize`; raises every refusal at once."""
    errors: list[QuantConvertError] = []
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, read, errors)
    target = None if dtype else get_layout(job.format)
    _check(checkpoint, sources, target, errors)
    raise_all(errors)
    tensors = _as_stored(sources.tensors)
    promises = [_promises(source, target, dtype) for source in tensors]
    outputs, shards = place(promises, job.max_shard_size)
    execution = execution_for(job.limits)
    tasks = [_task(s, o, sources, target, execution) for s, o in zip(tensors, outputs, strict=True)]
    check_memory(tasks, execution)
    check_accounts(checkpoint, tasks, sources.dropped)
    family = classifier.family.name if classifier.family else None
    selection = _selection(tasks, classifier)
    config = None if target is None else target.config(selection)
    notes = [] if target is None else all_caveats(target, selection)
    return Plan(
        job=job,
        checkpoint=checkpoint,
        family=family,
        format=target.name if target else PLAIN,
        format_reason=f"from {sources.method}, the same codes" if target else f"from {sources.method}, as {dtype}",
        tasks=tuple(tasks),
        shards=shards,
        source_format=sources.method,
        quantization_config=config,
        notes=tuple(notes),
        execution=execution,
        plain_dtype=dtype,
        dropped=sources.dropped,
        transformers_loads=target is None or loads_in_transformers(classifier.family, target, selection),
    )


def _check(checkpoint: Checkpoint, sources: Sources, target: Layout | None, errors: list[QuantConvertError]) -> None:
    """There must be something to change, and the layout asked for must hold it."""
    weights = [source for source in sources.tensors if isinstance(source, Weight) and source.num_bits]
    if not weights and not errors:
        block = checkpoint.quantization_block
        found = f"quant_method `{block.get('quant_method', '')}`" if block else "no quantization_config"
        errors.append(
            UnsupportedError(
                f"`{checkpoint.location}` is not quantized in a layout that can be read back: config.json has {found}",
                hint=f"layouts: {', '.join(METHODS)}",
            )
        )
    found_problems: dict[tuple[str, str], list[str]] = {}
    for weight in weights:
        for problem in _problems(weight, target):
            found_problems.setdefault(problem, []).append(weight.module)
    for (text, hint), modules in found_problems.items():
        errors.append(UnsupportedError(f"{text}: {some(modules)}", hint=hint))
    schemes = list(dict.fromkeys(_scheme(target, w.stored.scheme) for w in weights if w.stored)) if target else []
    mixed = target.mix_problem(schemes) if target and len(schemes) > 1 else None
    if mixed:
        errors.append(
            UnsupportedError(f"{mixed}: {', '.join(s.label for s in schemes)}", hint="--format compressed-tensors")
        )


def _problems(weight: Weight, target: Layout | None) -> list[tuple[str, str]]:
    """What the target cannot hold, with the hint."""
    if target is None:
        if weight.view.transposed and weight.view.expert is None:
            return [("weights that the family stores [in, out] are not turned back", "load the quantized ones")]
        if weight.view.expert is None and len(weight.shape) == 2:
            return []
        return [("fused experts are not written back as one tensor", "quantconvert convert --requantize splits them")]
    if weight.stored is None:
        return [(f"{weight.encoding} holds no integer codes", "quantconvert convert --requantize, or dequantize")]
    found = []
    if weight.stored.only_dequantize:
        found.append((weight.stored.only_dequantize, "quantconvert dequantize reads it"))
    problems = target.problems(_scheme(target, weight.stored.scheme), weight.shape, weight.module)
    return found + [(problem, "--format compressed-tensors") for problem in problems]


def _as_stored(tensors: Sequence[Source]) -> list[Source]:
    """Plain weights that conversion would split or turn stay the stored tensors that they are, each once."""
    kept: dict[str, Source] = {}
    for source in tensors:
        plain = isinstance(source, Weight) and not source.num_bits
        one = source.values if isinstance(source, Weight) and plain else source
        kept.setdefault(one.name, one)
    return list(kept.values())


def _scheme(target: Layout, scheme: Scheme) -> Scheme:
    """What the stored scheme is in another layout: a weight-only one drops the activations' part."""
    if scheme.activations and target.weight_only:
        return Scheme(scheme.num_bits, scheme.symmetric, scheme.strategy, scheme.group_size)
    return scheme


def _promises(source: Source, target: Layout | None, dtype: str | None) -> tuple[Promise, ...]:
    if not isinstance(source, Weight):
        return unchanged(source)
    if target is None:
        tag = PLAIN_TAGS[dtype or "bfloat16"]
        return (Promise(source.name, tag, source.shape, 1, False, nbytes_of(tag, source.num_elements)),)
    assert source.stored
    scheme = _scheme(target, source.stored.scheme)
    return promised(source.module, target.outputs(source.stored.shape, source.dtype, scheme))


def _task(
    source: Source, outputs: tuple[Output, ...], sources: Sources, target: Layout | None, execution: Execution
) -> Task:
    if not isinstance(source, Weight):
        return Task(source, "copy", "plain", "", None, outputs, min(source.nbytes, COPY_CHUNK_NBYTES))
    stored = source.stored
    scheme = _scheme(target, stored.scheme) if target and stored else None
    turned = sum(o.nbytes for o in outputs if o.transposed)
    multiple = max(read_multiple(source), target.row_multiple(scheme) if target and scheme else 1)
    parts = cut(source, source.shape, turned, multiple, execution)
    operation: Operation = "repack" if target else "dequantize"
    why = f"{sources.method}, {stored.scheme.label}" if stored else str(sources.method)
    return Task(source, operation, None, why, scheme, outputs, parts.peak_nbytes)


def _selection(tasks: Sequence[Task], classifier: Classifier) -> Selection:
    schemes: dict[Scheme, list[str]] = {}
    kept = []
    for task in tasks:
        if isinstance(task.source, Weight) and task.scheme:
            schemes.setdefault(task.scheme, []).append(task.source.module)
        elif task.source.name.endswith(WEIGHT_SUFFIX) and len(task.source.shape) == 2:
            reason = classifier.role(task.source).reason
            if reason is None or reason in LINEAR_REASONS:
                kept.append(task.source.name.removesuffix(WEIGHT_SUFFIX))
    has_experts = any(".experts." in name for names in schemes.values() for name in names)
    return Selection(
        {s: tuple(n) for s, n in schemes.items()}, tuple(kept), classifier.fused, has_experts, classifier.tied
    )
