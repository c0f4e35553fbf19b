"""What the user should know of a plan before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantconvert.checkpoint import Checkpoint
from quantconvert.dtypes import DTYPES
from quantconvert.engines import engine_notes
from quantconvert.errors import QuantConvertError, UnsupportedError, some
from quantconvert.job import Job
from quantconvert.patterns import template_of
from quantconvert.planning.choose import Choice
from quantconvert.planning.decision import Decision, requests_of
from quantconvert.planning.origin import requantized
from quantconvert.sources import Sources


def notes_on(
    checkpoint: Checkpoint,
    sources: Sources,
    decisions: Sequence[Decision],
    choice: Choice,
    job: Job,
) -> tuple[str, ...]:
    """What the user should know before it runs."""
    notes = engine_notes(choice.loadable, job.engines)
    if choice.loadable.family is None:
        kind = checkpoint.model_type or "no model_type"
        linear = list(dict.fromkeys(template_of(d.module) for d in decisions if d.request))
        notes.append(
            f"unknown family ({kind}): which weights are linear was decided from names; check the plan (--explain). "
            f"Quantized: {some(linear)}"
        )
    requests = requests_of(decisions)
    if job.preset and len(requests) == 1:
        notes.append(f"--preset {job.preset} makes no difference here: every quantized weight is {requests[0].label}")
    notes += _on_decisions(decisions, sources)
    notes += _on_rotation(decisions, job)
    if checkpoint.dropped_files:
        names = ", ".join(file.path for file in checkpoint.dropped_files[:4])
        more = " and more" if len(checkpoint.dropped_files) > 4 else ""
        notes.append(f"left behind as duplicate weights or stale configs: {names}{more}")
    return tuple(notes)


def _on_decisions(decisions: Sequence[Decision], sources: Sources) -> Iterator[str]:
    again = requantized(decisions)
    if again:
        bits = max(d.ref.num_bits or 0 for d in again)
        yield (
            f"--requantize: {len(again)} weights are decoded from {sources.method} ({bits} bits) and quantized again; "
            "the errors of both add up"
        )
    elif any(d.request and d.ref.num_bits for d in decisions):
        yield f"the source is quantized ({sources.method}): more bits do not bring back what that took from its weights"
    stray = _unknown_experts(decisions)
    if stray:
        yield f"--allow-kept-experts: {_on_experts(stray)}"
    skipped = sum(1 for d in decisions if d.reason == "indivisible")
    if skipped:
        yield f"{skipped} weights are kept because the group size does not divide them (--on-indivisible skip)"
    unaligned = [d for d in decisions if d.reason == "unaligned"]
    if unaligned:
        yield (
            f"{len(unaligned)} weights such as `{unaligned[0].module}` are kept: {unaligned[0].evidence}; FP8_DYNAMIC "
            "has no blocks"
        )


def _unknown_experts(decisions: Sequence[Decision]) -> list[Decision]:
    return [d for d in decisions if d.is_kept_experts and d.reason == "not 2-D"]


def _on_experts(stray: Sequence[Decision]) -> str:
    return (
        f"{len(stray)} fused expert tensors such as `{stray[0].ref.name}` stay in high precision: their layout is not "
        "known without a table for this family"
    )


def check_experts_known(decisions: Sequence[Decision], errors: list[QuantConvertError]) -> None:
    """Fused experts are most of a model: that they stay as they are is to be asked for."""
    stray = _unknown_experts(decisions)
    if stray:
        errors.append(
            UnsupportedError(
                _on_experts(stray),
                hint="--allow-kept-experts converts the rest; experts that are stored one by one need no table",
            )
        )


def _on_rotation(decisions: Sequence[Decision], job: Job) -> Iterator[str]:
    """What a rotation does to accuracy, as measured (mean KL to the bfloat16 model, SmolLM2-135M), and to size."""
    if not job.rotate:
        return
    requests = requests_of(decisions)
    if any(request.num_bits < 8 and request.strategy == "group" for request in requests):
        yield (
            "--rotate costs accuracy at int4 by groups (SmolLM2-135M: KL 0.338 without, 0.516 with, 0.175 "
            "equalized): it is for W8A8 (0.0255 without, 0.0113 with)"
        )
    kept = sum(1 for d in decisions if d.reason is not None and d.ref.steps)
    if kept:
        yield f"--rotate changes {kept} tensors that are kept; each is rounded once more to its own dtype"
    head = next((d for d in decisions if d.reason == "lm_head" and d.ref.parts > 1), None)
    if head is not None:
        yield (
            f"`{head.ref.name}`, which the source ties to the embeddings, is rotated by itself: "
            f"{head.ref.num_elements * DTYPES[head.ref.dtype].bits // 8} bytes more, tie_word_embeddings false"
        )
