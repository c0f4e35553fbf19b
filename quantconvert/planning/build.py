"""`build_plan`: a checkpoint and a job, nothing else, decide every byte's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all
from quantconvert.families import Classifier
from quantconvert.formats import Selection
from quantconvert.formats.base import all_caveats
from quantconvert.job import Job
from quantconvert.planning.choose import Choice, choose_format
from quantconvert.planning.decide import decide
from quantconvert.planning.decision import Decision
from quantconvert.planning.layout import Promise, place, promised, unchanged
from quantconvert.planning.memory import COPY_CHUNK_NBYTES, check_memory, cut, execution_for
from quantconvert.planning.model import Execution, Output, Plan, Task
from quantconvert.schemes import Scheme


def build_plan(checkpoint: Checkpoint, job: Job, nonfinite: Mapping[str, str] | None = None) -> Plan:
    """Decide everything, or raise every refusal at once.

    nonfinite: weights that hold NaN or Inf, name to description, when `--nan-policy keep` has looked for them.
    """
    errors: list[QuantConvertError] = []
    _check_unquantized(checkpoint, errors)
    _check_transposed(checkpoint, errors)
    classifier = Classifier(checkpoint)
    decisions = decide(checkpoint, job, classifier, nonfinite or {}, errors)
    quantized = [d for d in decisions if d.request]
    if not quantized and not errors:
        errors.append(_nothing_to_do(checkpoint, decisions))
    choice = choose_format(job, decisions, checkpoint.text_config, errors, classifier.awq_problem)
    raise_all(errors)
    execution = execution_for(job.limits)
    units = [_promises(decision, choice) for decision in decisions]
    outputs, shards = place(units, job.max_shard_nbytes)
    tasks = tuple(_task(d, o, choice, execution) for d, o in zip(decisions, outputs, strict=True))
    check_memory(tasks, execution)
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
        source_format=None,
        quantization_config=choice.format.config(selection),
        notes=_notes(checkpoint, decisions, choice, selection, classifier),
        execution=execution,
    )


# Families whose linear weights are transformers' Conv1D, stored [in, out] (transformers `pytorch_utils.py`).
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def _check_transposed(checkpoint: Checkpoint, errors: list[QuantConvertError]) -> None:
    if checkpoint.model_type in _CONV1D:
        errors.append(
            UnsupportedError(
                f"model_type `{checkpoint.model_type}` stores its weights transposed (Conv1D): not read yet"
            )
        )


QUANTIZED_SUFFIXES = (".weight_packed", ".qweight", ".weight_scale_inv", ".weight_scale", "_blocks", ".scales", ".SCB")


def _check_unquantized(checkpoint: Checkpoint, errors: list[QuantConvertError]) -> None:
    """A quantized source would be quantized twice, or half of it copied as if it were plain."""
    block = checkpoint.quantization_block
    method = block.get("quant_method", "unknown method") if block else None
    sidecar = next((ref.name for ref in checkpoint.tensors if ref.name.endswith(QUANTIZED_SUFFIXES)), None)
    if method or sidecar:
        where = f"config.json says `{method}`" if method else f"it holds `{sidecar}`"
        errors.append(
            UnsupportedError(
                f"source `{checkpoint.location}` is already quantized: {where}",
                hint="give the original checkpoint in bfloat16, float16 or float32",
            )
        )


def _nothing_to_do(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> UnsupportedError:
    reasons = ", ".join(sorted({str(d.reason) for d in decisions}))
    return UnsupportedError(
        f"`{checkpoint.location}` has no weight to quantize: all {len(decisions)} tensors are kept ({reasons})",
        hint="`quantconvert plan` lists the reason for each tensor",
    )


def _promises(decision: Decision, choice: Choice) -> tuple[Promise, ...]:
    ref = decision.ref
    if decision.request is None:
        return unchanged(ref)
    return promised(decision.module, choice.format.outputs(ref.shape, ref.dtype, choice.scheme(decision.request)))


def _task(decision: Decision, outputs: tuple[Output, ...], choice: Choice, execution: Execution) -> Task:
    ref = decision.ref
    if decision.request is None:
        peak = min(ref.nbytes, COPY_CHUNK_NBYTES)
        return Task(ref, "copy", decision.reason, decision.evidence, None, outputs, peak)
    scheme = choice.scheme(decision.request)
    turned = sum(o.nbytes for o in outputs if o.transposed)
    parts = cut(ref.shape, ref.dtype, turned, choice.format.row_multiple(scheme), execution)
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


def _notes(
    checkpoint: Checkpoint, decisions: Sequence[Decision], choice: Choice, selection: Selection, classifier: Classifier
) -> tuple[str, ...]:
    """What the user should know before it runs."""
    notes = all_caveats(choice.format, selection)
    if choice.format.name == "awq" and classifier.awq_problem:
        notes.append(classifier.awq_problem)
    family = classifier.family.name if classifier.family else None
    if family is None:
        kind = checkpoint.model_type or "no model_type"
        notes.append(f"unknown family ({kind}): which weights are linear was decided from names; check the plan")
    stray = [d for d in decisions if d.is_kept_experts]
    if stray:
        notes.append(
            f"{len(stray)} fused expert tensors such as `{stray[0].ref.name}` are kept: only 2-D experts are read"
        )
    skipped = sum(1 for d in decisions if d.reason == "indivisible")
    if skipped:
        notes.append(f"{skipped} weights are kept because the group size does not divide them (--on-indivisible skip)")
    if checkpoint.dropped_files:
        names = ", ".join(file.path for file in checkpoint.dropped_files[:4])
        more = " and more" if len(checkpoint.dropped_files) > 4 else ""
        notes.append(f"left behind as duplicate weights or stale configs: {names}{more}")
    return tuple(notes)
