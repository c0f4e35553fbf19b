"""What happens to each tensor: quantized under which scheme, or kept for which reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import QuantConvertError, UnsupportedError, UsageError
from quantconvert.families import Classifier, FusedSet, Reason
from quantconvert.job import Job, Scheme
from quantconvert.patterns import WEIGHT_SUFFIX, compile_pattern, module_of, nearest

# Kept weights that engines hold as ordinary linear layers: the config block must name them.
LINEAR_REASONS: frozenset[Reason] = frozenset(
    {"lm_head", "router", "vision", "audio", "state-space", "mtp", "head", "family", "ignored", "indivisible",
     "non-finite"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """One source tensor: kept (`reason` set) or to be quantized."""

    ref: TensorRef
    reason: Reason | None
    evidence: str
    is_expert: bool = False
    strategy_override: bool = False

    @property
    def module(self) -> str:
        return self.ref.name.removesuffix(WEIGHT_SUFFIX)

    @property
    def is_kept_linear(self) -> bool:
        """Kept, but an engine would take it for a linear layer unless told."""
        return self.reason in LINEAR_REASONS and len(self.ref.shape) == 2 and self.ref.name.endswith(WEIGHT_SUFFIX)


def decide(
    checkpoint: Checkpoint,
    job: Job,
    classifier: Classifier,
    nonfinite: Mapping[str, str],
    errors: list[QuantConvertError],
) -> list[Decision]:
    """One decision a tensor, in the checkpoint's order; refusals are appended to `errors`."""
    ignored = _ignored(checkpoint, job.ignore, errors)
    decisions = []
    for ref in checkpoint.tensors:
        role = classifier.role(ref)
        reason, evidence = role.reason, role.evidence
        if reason is None and ref.name in nonfinite:
            reason, evidence = "non-finite", nonfinite[ref.name]
        if reason is None and ref.name in ignored:
            reason, evidence = "ignored", f"--ignore {ignored[ref.name]}"
        decisions.append(Decision(ref, reason, evidence, role.is_expert))
    decisions = _widen_nonfinite(decisions, classifier.fused)
    decisions = _indivisible(decisions, job, errors)
    _check_fused(decisions, classifier.fused, errors)
    return decisions


def scheme_of(decision: Decision, base: Scheme) -> Scheme:
    """The scheme of one quantized weight: the job's, or per channel where its group size does not divide."""
    return replace(base, strategy="channel", group_size=None) if decision.strategy_override else base


def _ignored(checkpoint: Checkpoint, patterns: Sequence[str], errors: list[QuantConvertError]) -> dict[str, str]:
    """Tensor name to the pattern that ignores it; a pattern without a match is a mistake worth stopping for."""
    found: dict[str, str] = {}
    names = [ref.name for ref in checkpoint.tensors]
    for pattern in patterns:
        try:
            matches = compile_pattern(pattern)
        except UsageError as error:
            errors.append(error)
            continue
        hits = [name for name in names if matches(module_of(name)) or matches(name)]
        if not hits:
            close = nearest(pattern, [module_of(name) for name in names])
            hint = f"names like it: {', '.join(f'`{name}`' for name in close)}" if close else None
            errors.append(UsageError(f"--ignore `{pattern}` matches no tensor", hint=hint))
        for name in hits:
            found.setdefault(name, pattern)
    return found


def _fused_groups(decisions: Sequence[Decision], fused: Sequence[FusedSet]) -> list[tuple[FusedSet, list[int]]]:
    """Each fused set that the checkpoint holds, with the positions of its members' weights."""
    at = {d.ref.name: i for i, d in enumerate(decisions)}
    groups = []
    for fused_set in fused:
        first = f".{fused_set.members[0]}{WEIGHT_SUFFIX}"
        for name in at:
            if name.endswith(first):
                stem = name[: -len(first)]
                members = [at.get(f"{stem}.{member}{WEIGHT_SUFFIX}") for member in fused_set.members]
                groups.append((fused_set, [i for i in members if i is not None]))
    return groups


def _widen_nonfinite(decisions: list[Decision], fused: Sequence[FusedSet]) -> list[Decision]:
    """A weight kept for NaN takes its fused siblings along: engines load them as one."""
    if not any(d.reason == "non-finite" for d in decisions):
        return decisions
    for fused_set, members in _fused_groups(decisions, fused):
        if any(decisions[i].reason == "non-finite" for i in members):
            for i in members:
                if decisions[i].reason is None:
                    evidence = f"fused with a non-finite weight as {fused_set.name}"
                    decisions[i] = replace(decisions[i], reason="non-finite", evidence=evidence)
    return decisions


def _check_fused(decisions: Sequence[Decision], fused: Sequence[FusedSet], errors: list[QuantConvertError]) -> None:
    """vLLM and SGLang refuse a fused layer of which only some parts are quantized."""
    for fused_set, members in _fused_groups(decisions, fused):
        kept = [i for i in members if decisions[i].reason is not None]
        if not kept or len(kept) == len(members):
            continue
        stem = decisions[members[0]].module.rpartition(".")[0]
        left = [decisions[i].module.rpartition(".")[2] for i in members if i not in kept]
        why = ", ".join(f"{decisions[i].module.rpartition('.')[2]} ({decisions[i].reason})" for i in kept)
        names = "|".join(fused_set.members)
        errors.append(
            UnsupportedError(
                f"`{stem}`: engines load {', '.join(fused_set.members)} as one {fused_set.name}, "
                f"but {why} stays in high precision and {', '.join(left)} does not",
                hint=f"keep all of them: --ignore 're:.*({names})$'",
            )
        )


def _indivisible(decisions: list[Decision], job: Job, errors: list[QuantConvertError]) -> list[Decision]:
    """Apply --on-indivisible to weights whose in_features the group size does not divide."""
    size = job.group_size
    bad = [i for i, d in enumerate(decisions) if size > 0 and d.reason is None and d.ref.shape[1] % size]
    if not bad:
        return decisions
    if job.on_indivisible == "error":
        errors.append(_indivisible_error(decisions, bad, size))
    for i in bad:
        if job.on_indivisible == "skip":
            evidence = f"in_features {decisions[i].ref.shape[1]} % group_size {size} != 0"
            decisions[i] = replace(decisions[i], reason="indivisible", evidence=evidence)
        elif job.on_indivisible == "channel":
            decisions[i] = replace(decisions[i], strategy_override=True)
    return decisions


def _indivisible_error(decisions: Sequence[Decision], bad: Sequence[int], size: int) -> UnsupportedError:
    lines = [f"\n  `{decisions[i].ref.name}`: in_features {decisions[i].ref.shape[1]}" for i in bad]
    widths = {d.ref.shape[1] for d in decisions if d.reason is None}
    fitting = next((g for g in (512, 256, 128, 64, 32, 16, 8) if g < size and not any(w % g for w in widths)), None)
    best = f"--group-size {fitting} divides every layer; or " if fitting else ""
    return UnsupportedError(
        f"--group-size {size} does not divide in_features of {len(bad)} weights:{''.join(lines)}",
        hint=f"{best}--on-indivisible skip (keep them in high precision) or channel (one scale a row)",
    )
