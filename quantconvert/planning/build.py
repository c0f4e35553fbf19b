"""`build_plan`: a checkpoint and a job, nothing else, decide every byte's place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all, some
from quantconvert.families import Classifier, Family
from quantconvert.job import Job
from quantconvert.layouts import Layout, Selection
from quantconvert.planning.account import check_accounts
from quantconvert.planning.choose import Choice, choose_format
from quantconvert.planning.decide import decide
from quantconvert.planning.decision import Decision
from quantconvert.planning.dims import check_dims
from quantconvert.planning.memory import COPY_CHUNK_NBYTES, check_memory, cut, execution_for, read_multiple
from quantconvert.planning.notes import notes_on
from quantconvert.planning.place import Promise, named, place, unchanged, unnamed
from quantconvert.planning.plan import Execution, Operation, Output, Plan, Task
from quantconvert.planning.presence import check_presence
from quantconvert.schemes import Scheme
from quantconvert.sources import Weight, find_sources


def build_plan(
    checkpoint: Checkpoint,
    job: Job,
    read: Callable[[TensorRef], bytes],
    nonfinite: Mapping[str, str] | None = None,
) -> Plan:
    """Decide everything, or raise every refusal at once.

    read: the bytes of a small tensor, asked for only where the source is quantized by GPTQ or AWQ.
    nonfinite: weights that hold NaN or Inf, name to description, when `--nan-policy keep` has looked for them.
    """
    errors: list[QuantConvertError] = []
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, read, errors)
    if not errors:
        check_dims(sources, classifier, checkpoint.text_config, errors)
    lacks = check_presence(checkpoint, sources, classifier, job, errors) if not errors else ()
    decisions = decide(checkpoint, sources, job, classifier, nonfinite or {}, errors)
    if job.strict:
        _check_strict(decisions, classifier, errors)
    quantized = [d for d in decisions if d.request]
    if not quantized and not errors:
        errors.append(_nothing_to_do(checkpoint, decisions))
    loads = classifier.family is None or classifier.family.transformers
    choice = choose_format(job, decisions, checkpoint.text_config, errors, classifier.awq_problem, loads)
    raise_all(errors)
    execution = execution_for(job.limits)
    of_shape = cache(lambda shape, dtype, scheme: unnamed(choice.format.outputs(shape, dtype, scheme)))
    units = [_promises(decision, choice, of_shape) for decision in decisions]
    outputs, shards = place(units, job.max_shard_nbytes)
    tasks = tuple(_task(d, o, choice, execution) for d, o in zip(decisions, outputs, strict=True))
    check_memory(tasks, execution)
    check_accounts(checkpoint, tasks, sources.dropped)
    selection = _selection(decisions, choice, classifier)
    family = classifier.family.name if classifier.family else None
    return Plan(
        job=job,
        checkpoint=checkpoint,
        family=family,
        format=choice.format.name,
        format_reason=choice.reason,
        tasks=tasks,
        shards=shards,
        source_format=sources.method,
        quantization_config=choice.format.config(selection),
        notes=(*lacks, *notes_on(checkpoint, sources, decisions, choice, selection, classifier)),
        execution=execution,
        dropped=sources.dropped,
        transformers_loads=loads_in_transformers(classifier.family, choice.format, selection),
    )


def loads_in_transformers(family: Family | None, fmt: Layout, selection: Selection) -> bool:
    """Whether transformers 5 loads the result; where it does so wrongly, nobody should be sent there."""
    if selection.has_experts and not fmt.transformers_loads_experts:
        return False
    return family is None or family.transformers


def _check_strict(decisions: Sequence[Decision], classifier: Classifier, errors: list[QuantConvertError]) -> None:
    """--strict: what stays in high precision must be in the family's table, the config, or the user's own rules."""
    found = [d for d in decisions if (d.is_kept_linear or d.is_kept_experts) and not d.by_table]
    if found:
        table = f"the table of {classifier.family.name}" if classifier.family else "any table (unknown family)"
        reasons = ", ".join(sorted({str(d.reason) for d in found}))
        errors.append(
            UnsupportedError(
                f"--strict: {len(found)} linear weights would stay in high precision for reasons outside {table} "
                f"({reasons}): {some([d.module for d in found])}",
                hint="accept them by --ignore PATTERN, quantize them by --rule PATTERN=SCHEME, or drop --strict",
            )
        )


def _nothing_to_do(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> UnsupportedError:
    reasons = ", ".join(sorted({str(d.reason) for d in decisions}))
    return UnsupportedError(
        f"`{checkpoint.location}` has no weight to quantize: all {len(decisions)} tensors are kept ({reasons})",
        hint="`quantconvert plan` lists the reason for each tensor",
    )


def _promises(
    decision: Decision, choice: Choice, of_shape: Callable[[tuple[int, ...], str, Scheme], tuple[Promise, ...]]
) -> tuple[Promise, ...]:
    ref = decision.ref
    if decision.request is None:
        return unchanged(ref)
    return named(decision.module, of_shape(ref.shape, ref.dtype, choice.scheme(decision.request)))


def _task(decision: Decision, outputs: tuple[Output, ...], choice: Choice, execution: Execution) -> Task:
    ref = decision.ref
    if decision.request is None:
        if decision.is_decoded:
            peak = cut(ref, ref.shape, 0, read_multiple(ref), execution).peak_nbytes
            return Task(ref, "dequantize", decision.reason, decision.evidence, None, outputs, peak)
        peak = min(ref.nbytes, COPY_CHUNK_NBYTES)
        operation: Operation = "split" if isinstance(ref, Weight) else "copy"
        return Task(ref, operation, decision.reason, decision.evidence, None, outputs, peak)
    scheme = choice.scheme(decision.request)
    turned = sum(o.nbytes for o in outputs if o.transposed)
    multiple = math.lcm(choice.format.row_multiple(scheme), read_multiple(ref))
    parts = cut(ref, ref.shape, turned, multiple, execution)
    return Task(ref, "quantize", None, decision.evidence, scheme, outputs, parts.peak_nbytes)


def _selection(decisions: Sequence[Decision], choice: Choice, classifier: Classifier) -> Selection:
    schemes: dict[Scheme, list[str]] = {}
    for d in decisions:
        if d.request:
            schemes.setdefault(choice.scheme(d.request), []).append(d.module)
    return Selection(
        schemes={scheme: tuple(modules) for scheme, modules in schemes.items()},
        kept=tuple(
            dict.fromkeys(
                [
                    *(d.module for d in decisions if d.is_kept_linear),
                    *(d.module.rpartition(".")[0] for d in decisions if d.is_kept_experts),
                ]
            )
        ),
        fused=classifier.fused,
        has_experts=any(d.is_expert for d in decisions),
        tied=classifier.tied,
    )
