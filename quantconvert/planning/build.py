"""`build_plan` and `build_transcode`: a checkpoint and a job, nothing else, decide every byte's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.engines import PLAIN
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all, some
from quantconvert.families import Classifier
from quantconvert.job import Job
from quantconvert.kernels import check_choice
from quantconvert.methods import METHODS
from quantconvert.options import PlainDType
from quantconvert.planning.account import check_accounts
from quantconvert.planning.choose import choose_format
from quantconvert.planning.decide import decide, find_siblings
from quantconvert.planning.decided import Decided, meets, select
from quantconvert.planning.decision import Decision
from quantconvert.planning.dims import check_dims
from quantconvert.planning.folds import equalized, without_factors
from quantconvert.planning.inputs import input_maxima, note_statistics, statistics_of
from quantconvert.planning.known import check_steps, find_knowledge, note_unknown
from quantconvert.planning.lower import Lowering
from quantconvert.planning.memory import check_memory, execution_for
from quantconvert.planning.methods import check_schemes
from quantconvert.planning.notes import check_experts_known, notes_on
from quantconvert.planning.place import place
from quantconvert.planning.plan import Plan
from quantconvert.planning.presence import check_presence
from quantconvert.sources import find_sources


def build_plan(
    checkpoint: Checkpoint,
    job: Job,
    read: Callable[[TensorRef], bytes],
    nonfinite: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a conversion; raises every refusal at once.

    read: the bytes of a small tensor, asked for only where the source is quantized by GPTQ or AWQ.
    nonfinite: weights that hold NaN or Inf, name to description, when `--nan-policy keep` has looked for them.
    """
    return _plan_of(_decide_conversion(checkpoint, job, read, nonfinite or {}))


def build_transcode(
    checkpoint: Checkpoint, job: Job, read: Callable[[TensorRef], bytes], dtype: PlainDType | None = None
) -> Plan:
    """The plan of `repack` (to `job.format`) or, with a `dtype`, of `dequantize`; raises every refusal at once."""
    from quantconvert.planning.transcode import decide_transcode

    return _plan_of(decide_transcode(checkpoint, job, read, dtype))


def _plan_of(decided: Decided) -> Plan:
    """Lower every decision to a task, and place what it writes."""
    job, lowering, layout = decided.job, decided.lowering, decided.layout
    outputs, shards = place([lowering.unit(d) for d in decided.decisions], job.max_shard_size)
    tasks = tuple(lowering.task(d, o) for d, o in zip(decided.decisions, outputs, strict=True))
    check_memory(tasks, lowering.execution)
    check_accounts(decided.checkpoint, tasks, decided.sources.dropped)
    family = decided.classifier.family
    return Plan(
        job=job,
        checkpoint=decided.checkpoint,
        family=family.name if family else None,
        format=layout.name if layout else PLAIN,
        format_reason=decided.reason,
        tasks=tasks,
        shards=shards,
        source_format=decided.sources.method,
        quantization_config=decided.config,
        notes=decided.notes,
        execution=lowering.execution,
        plain_dtype=decided.plain_dtype,
        dropped=decided.sources.dropped,
        loadable=decided.loadable,
        changes=decided.sources.changes,
        factors=decided.factors,
        knowledge=decided.knowledge,
        statistics=decided.statistics,
    )


def _decide_conversion(
    checkpoint: Checkpoint, job: Job, read: Callable[[TensorRef], bytes], nonfinite: Mapping[str, str]
) -> Decided:
    errors: list[QuantConvertError] = []
    checkpoint = without_factors(checkpoint)
    method = METHODS.find(job.method)
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, read, errors, job.step_names)
    if not errors:
        check_dims(sources, classifier, checkpoint.text_config, errors)
    lacks = () if errors else check_presence(checkpoint, sources, classifier, job, errors)
    decisions = decide(checkpoint, sources, job, classifier, nonfinite, errors)
    if job.strict:
        _check_strict(decisions, classifier, errors)
    if not job.allow_kept_experts:
        check_experts_known(decisions, errors)
    if not any(d.request for d in decisions) and not errors:
        errors.append(_nothing_to_do(checkpoint, decisions))
    statistics = statistics_of(job, checkpoint, sources, read, errors)
    knowledge = find_knowledge(job, statistics, decisions, checkpoint, classifier.family, errors)
    model = meets(checkpoint, classifier, any(d.is_expert for d in decisions))
    choice = choose_format(job, decisions, checkpoint.text_config, errors, model)
    decisions, factors, unequal = equalized(checkpoint, decisions, job, classifier, knowledge, errors)
    maxima = input_maxima(job, statistics, decisions, classifier.fused, errors)
    check_choice(errors)
    check_steps(method, decisions, errors)
    check_schemes(method, choice, decisions, job.engines, errors)
    raise_all(errors)
    siblings = find_siblings(decisions, classifier.fused)
    lowering = Lowering(choice.format, method, execution_for(job.limits), maxima, knowledge, siblings)
    selection = select(decisions, lowering, classifier)
    notes = (
        *lacks,
        *notes_on(checkpoint, sources, decisions, choice, job),
        *unequal,
        *note_unknown(method, knowledge, decisions),
        *note_statistics(statistics, decisions, method.needs != "nothing" or factors is not None),
    )
    return Decided(
        checkpoint, job, classifier, sources, decisions, lowering, choice.reason, notes, selection, choice.loadable,
        factors=factors, statistics=statistics, knowledge=knowledge,
    )  # fmt: skip


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
    if not decisions:
        return UnsupportedError(
            f"`{checkpoint.location}` holds no tensor", hint="the weights may not have been downloaded yet"
        )
    reasons = ", ".join(sorted({str(d.reason) for d in decisions}))
    return UnsupportedError(
        f"`{checkpoint.location}` has no weight to quantize: all {len(decisions)} tensors are kept ({reasons})",
        hint="`quantconvert plan` lists the reason for each tensor",
    )
