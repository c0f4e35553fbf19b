"""Plans that start from a quantized checkpoint: another layout for the same codes, or plain weights again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.dtypes import nbytes_of
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all, some
from quantconvert.families import Classifier
from quantconvert.formats import Format, Selection, Stored, get_format
from quantconvert.formats.base import all_caveats
from quantconvert.job import Job
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.planning.decision import LINEAR_REASONS
from quantconvert.planning.layout import Promise, place, promised, unchanged
from quantconvert.planning.memory import COPY_CHUNK_NBYTES, check_memory, cut, execution_for
from quantconvert.planning.model import Execution, Output, Plan, Task
from quantconvert.schemes import Scheme
from quantconvert.sources.stored import find_stored, specs_of

PLAIN = "plain"
PlainDType = Literal["bfloat16", "float16", "float32"]
PLAIN_TAGS: dict[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def build_transcode(
    checkpoint: Checkpoint, job: Job, read: Callable[[TensorRef], bytes], dtype: PlainDType | None = None
) -> Plan:
    """The plan of `repack` (to `job.format`) or, with a `dtype`, of `dequantize`; raises every refusal at once."""
    errors: list[QuantConvertError] = []
    source, stored = find_stored(checkpoint, read, errors)
    target = None if dtype else get_format(job.format)
    found: dict[tuple[str, str], list[str]] = {}
    for one in stored if target else ():
        assert target
        if one.only_dequantize:
            found.setdefault((one.only_dequantize, "quantconvert dequantize reads it"), []).append(one.module)
        for problem in target.problems(_scheme(target, one.scheme), one.shape, one.module):
            found.setdefault((problem, "--format compressed-tensors"), []).append(one.module)
    for (problem, hint), modules in found.items():
        errors.append(UnsupportedError(f"{problem}: {some(modules)}", hint=hint))
    schemes = list(dict.fromkeys(_scheme(target, one.scheme) for one in stored)) if target else []
    mixed = target.mix_problem(schemes) if target and len(schemes) > 1 else None
    if mixed:
        errors.append(
            UnsupportedError(f"{mixed}: {', '.join(s.label for s in schemes)}", hint="--format compressed-tensors")
        )
    raise_all(errors)
    by_ref = {ref.name: one for one in stored for ref in one.refs.values()}
    units = [(ref, by_ref.get(ref.name)) for ref in checkpoint.tensors if _leads(ref, by_ref.get(ref.name))]
    promises = [_promises(ref, one, target, dtype) for ref, one in units]
    outputs, shards = place(promises, job.max_shard_nbytes)
    execution = execution_for(job.limits)
    tasks = [_task(r, s, o, source, target, execution) for (r, s), o in zip(units, outputs, strict=True)]
    check_memory(tasks, execution)
    classifier = Classifier(checkpoint)
    family = classifier.family.name if classifier.family else None
    selection = _selection(tasks, classifier)
    config = None if target is None else target.config(selection)
    notes = [] if target is None else all_caveats(target, selection)
    return Plan(
        job=job,
        checkpoint=checkpoint,
        family=family,
        format=target.name if target else PLAIN,
        format_reason=f"from {source.name}, the same codes" if target else f"from {source.name}, as {dtype}",
        tasks=tuple(tasks),
        shards=shards,
        source_format=source.name,
        quantization_config=config,
        notes=tuple(notes),
        execution=execution,
        plain_dtype=dtype,
    )


def _scheme(target: Format, scheme: Scheme) -> Scheme:
    """What the stored scheme is in another layout: a weight-only one drops the activations' part."""
    if scheme.activations and target.weight_only:
        return Scheme(scheme.num_bits, scheme.symmetric, scheme.strategy, scheme.group_size)
    return scheme


def _leads(ref: TensorRef, stored: Stored | None) -> bool:
    """Whether a tensor begins a task: a plain one, or the first of a module's."""
    return stored is None or next(iter(stored.refs.values())) is ref


def _promises(ref: TensorRef, stored: Stored | None, target: Format | None, dtype: str | None) -> tuple[Promise, ...]:
    if stored is None:
        return unchanged(ref)
    if target is None:
        tag = PLAIN_TAGS[dtype or "bfloat16"]
        nbytes = nbytes_of(tag, stored.shape[0] * stored.shape[1])
        return (Promise(stored.module + WEIGHT_SUFFIX, tag, stored.shape, 1, False, nbytes),)
    return promised(stored.module, target.outputs(stored.shape, stored.scale.dtype, _scheme(target, stored.scheme)))


def _task(
    ref: TensorRef,
    stored: Stored | None,
    outputs: tuple[Output, ...],
    source: Format,
    target: Format | None,
    execution: Execution,
) -> Task:
    if stored is None:
        return Task(ref, "copy", "plain", "", None, outputs, min(ref.nbytes, COPY_CHUNK_NBYTES))
    scheme = _scheme(target, stored.scheme) if target else None
    turned = sum(o.nbytes for o in outputs if o.transposed)
    multiple = max(source.row_multiple(stored.scheme), target.row_multiple(scheme) if target and scheme else 1)
    parts = cut(stored.shape, "F32", turned, multiple, execution)
    # a tensor that is stored transposed is read whole
    held = sum(spec.nbytes for spec in specs_of(source, stored).values() if spec.transposed)
    operation: Literal["repack", "dequantize"] = "repack" if target else "dequantize"
    why = f"{source.name}, {stored.scheme.label}"
    return Task(ref, operation, None, why, scheme, outputs, parts.peak_nbytes + held, stored)


def _selection(tasks: Sequence[Task], classifier: Classifier) -> Selection:
    schemes: dict[Scheme, list[str]] = {}
    kept = []
    for task in tasks:
        if task.stored and task.scheme:
            schemes.setdefault(task.scheme, []).append(task.stored.module)
        elif task.source.name.endswith(WEIGHT_SUFFIX) and len(task.source.shape) == 2:
            reason = classifier.role(task.source).reason
            if reason is None or reason in LINEAR_REASONS:
                kept.append(task.source.name.removesuffix(WEIGHT_SUFFIX))
    has_experts = any(".experts." in name for names in schemes.values() for name in names)
    return Selection(
        {s: tuple(n) for s, n in schemes.items()}, tuple(kept), classifier.fused, has_experts, classifier.tied
    )
