"""What the source's own form asks of the decisions: kept tensors stay as stored, nothing is quantized twice unasked."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.errors import QuantConvertError, UnsupportedError, some
from quantconvert.job import Job
from quantconvert.planning.decision import Decision
from quantconvert.sources import Sources, as_stored
from quantconvert.sources.read import WHOLE


def check_sources(decisions: Sequence[Decision], sources: Sources, job: Job, errors: list[QuantConvertError]) -> None:
    """Refuse what would lose precision unasked, and what cannot be decoded into a place where engines look for it."""
    again = requantized(decisions)
    if again and not job.requantize:
        bits = sorted({d.ref.num_bits or 0 for d in again})
        errors.append(
            UnsupportedError(
                f"the source is already quantized (`{sources.method}`, {' and '.join(map(str, bits))} bits): "
                f"{len(again)} weights would be quantized again to as many bits or fewer: "
                f"{some([d.module for d in again])}",
                hint="--requantize does that (both errors add up); better, give the original checkpoint",
            )
        )
    kept = [d for d in decisions if d.reason is not None]
    turned = [d for d in kept if d.is_decoded and d.ref.view.transposed]
    turned = [d for d in turned if _expert(d) is None]
    if turned:
        errors.append(
            UnsupportedError(
                f"{len(turned)} weights that the family stores [in, out] are quantized in the source, and would be "
                f"kept: {some([d.ref.name for d in turned])}",
                hint="quantize them: drop the rule that keeps them",
            )
        )
    changed = [d for d in kept if d.ref.steps and d.ref.view != WHOLE]
    if changed:
        errors.append(
            UnsupportedError(
                f"{len(changed)} weights that are a part of a stored tensor, or stored [in, out], would be kept but "
                f"take a step of the conversion: {some([d.ref.name for d in changed])}",
                hint="quantize them: drop the rule that keeps them",
            )
        )
    stuck = [d for d in kept if d.is_decoded and (len(d.ref.shape) != 2 or _expert(d) is not None)]
    if stuck:
        errors.append(
            UnsupportedError(
                f"{len(stuck)} fused experts are quantized in the source and would be kept, in a form that no engine "
                f"reads: {some([d.ref.name for d in stuck])}",
                hint="quantize them: drop the rule that keeps them",
            )
        )


def requantized(decisions: Sequence[Decision]) -> list[Decision]:
    """Weights that had as few bits before as they are to have."""
    return [d for d in decisions if d.request and d.request.num_bits <= (d.ref.num_bits or 0)]


def merge_kept(decisions: Sequence[Decision]) -> list[Decision]:
    """What is kept stays as it is stored: turned, or fused with the other experts of its layer.

    Only where those experts are quantized, one by one, what belongs to them (their biases) is split like them.
    """
    split = {_expert(d) for d in decisions if d.request and d.ref.view is not WHOLE}
    merged, seen = [], set()
    for d in decisions:
        ref = d.ref
        if d.request or d.is_decoded or ref.is_stored or ref.steps or (_expert(d) and _expert(d) in split):
            merged.append(d)
        elif ref.values.name not in seen:
            seen.add(ref.values.name)
            merged.append(d._replace(ref=as_stored(ref.values)))
    return merged


def _expert(decision: Decision) -> str | None:
    """The layer's experts that a split tensor belongs to; None where it was not split."""
    ref = decision.ref
    return ref.name.rpartition(".experts.")[0] if ref.view.expert is not None else None
