"""What happens to each tensor: quantized under which scheme, or kept for which reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UnsupportedError
from quantconvert.families import REASON_TEXT, Classifier, FusedSet, Role, fused_groups
from quantconvert.job import Job
from quantconvert.patterns import WEIGHT_SUFFIX, experts_of, template_of
from quantconvert.planning.aligned import keep_unaligned
from quantconvert.planning.decision import Decision, requests_of
from quantconvert.planning.origin import check_sources, merge_kept
from quantconvert.planning.rules import Verdict, verdicts
from quantconvert.planning.widths import fit_widths
from quantconvert.schemes import Request, scheme_name
from quantconvert.sources import Read, Sources


def decide(
    checkpoint: Checkpoint,
    sources: Sources,
    job: Job,
    classifier: Classifier,
    nonfinite: Mapping[str, str],
    errors: list[QuantConvertError],
) -> list[Decision]:
    """One decision a tensor, in the checkpoint's order; refusals are appended to `errors`."""
    rules = verdicts(checkpoint, sources.reads, job, errors)
    decisions = []
    fates: dict[tuple[int, int, bool], tuple[Any, ...]] = {}  # of all tensors with one role and one verdict
    for ref, role in zip(sources.reads, classifier.roles(sources.reads), strict=True):
        verdict = rules.get(ref.name) if rules else None
        alike = id(role), id(verdict), ref.num_bits is None
        if alike not in fates:
            fates[alike] = _fate(ref, role, verdict, job.base, sources.method)[1:]
        decision = Decision(ref, *fates[alike])
        if verdict and verdict.forced and verdict.request and decision.reason:
            why = f"stays in high precision: {REASON_TEXT[decision.reason]}"
            errors.append(UnsupportedError(f"{verdict.evidence}: `{ref.name}` {why}", hint="drop this rule"))
        if decision.request and ref.name in nonfinite:
            decision = decision.kept("non-finite", nonfinite[ref.name])
        decisions.append(decision)
    _check_head(checkpoint, decisions, errors)
    decisions = _widen_nonfinite(decisions, classifier.fused)
    decisions = fit_widths(decisions, job, checkpoint.text_config, errors)
    if any(request.block for request in requests_of(decisions)):
        groups = [(fused_set.name, members) for fused_set, members in _fused_groups(decisions, classifier.fused)]
        decisions = keep_unaligned(decisions, groups)
    _check_fused(decisions, classifier.fused, errors)
    _check_experts(decisions, errors)
    check_sources(decisions, sources, job, errors)
    return merge_kept(decisions)


def _fate(ref: Read, role: Role, verdict: Verdict | None, base: Request, method: str | None) -> Decision:
    """What becomes of `ref`, and of all that have its role and verdict and are quantized in the source or not, as it
    is. method: the source's own quantization.
    """
    decision = _by_rule(ref, role, verdict, base)
    if decision.request and verdict is None and method and ref.num_bits is None:
        return decision.kept("plain", f"source is quantized by {method}, and left this one alone")
    return decision


def _by_rule(ref: Read, role: Role, verdict: Verdict | None, base: Request) -> Decision:
    """A rule changes the scheme of what is quantized anyway; what is kept by default it must name exactly."""
    forced = verdict is not None and verdict.forced and role.reason in ("lm_head", "head", "family", "router")
    if role.reason is not None and not (forced and verdict and verdict.request):
        return Decision(ref, role.reason, role.evidence, role.is_expert, by_table=role.by_table)
    if verdict is None:
        return Decision(ref, None, role.evidence, role.is_expert, base, role.by_table)
    if verdict.request is None:
        return Decision(ref, "ignored", verdict.evidence, role.is_expert)
    return Decision(ref, None, f"{role.evidence}; {verdict.evidence}", role.is_expert, verdict.request)


def _check_head(checkpoint: Checkpoint, decisions: Sequence[Decision], errors: list[QuantConvertError]) -> None:
    """A tied output head is the embedding: quantizing it would leave the embedding without its table."""
    tied = checkpoint.config.get("tie_word_embeddings", checkpoint.text_config.get("tie_word_embeddings", False))
    for d in decisions if tied else ():
        if d.request and d.module.endswith("lm_head"):
            errors.append(
                UnsupportedError(
                    f"`{d.module}` is tied to the embeddings (tie_word_embeddings): engines read the embedding instead",
                    hint="drop the rule for it, or untie the model first",
                )
            )


def _fused_groups(decisions: Sequence[Decision], fused: Sequence[FusedSet]) -> list[tuple[FusedSet, list[int]]]:
    """Each fused set that the checkpoint holds, with the positions of its members' weights."""
    parts = tuple(f".{member}{WEIGHT_SUFFIX}" for fused_set in fused for member in fused_set.members)
    at = {d.module: i for i, d in enumerate(decisions) if d.ref.name.endswith(parts)}
    return [(fused_set, [at[module] for module in members]) for fused_set, members in fused_groups(at, fused)]


def find_siblings(decisions: Sequence[Decision], fused: Sequence[FusedSet]) -> dict[str, tuple[Read, ...]]:
    """For each weight whose scales have a divisor, by name, the others that engines load with it as one layer."""
    found: dict[str, dict[str, Read]] = {}
    if not any(request.scales == "e4m3" for request in requests_of(decisions)):
        return {}
    for _, members in _fused_groups(decisions, fused):
        reads = {decisions[i].ref.name: decisions[i].ref for i in members if decisions[i].request}
        for name in reads:
            found.setdefault(name, {}).update(reads)
    return {name: tuple(read for read in reads.values() if read.name != name) for name, reads in found.items()}


def _widen_nonfinite(decisions: list[Decision], fused: Sequence[FusedSet]) -> list[Decision]:
    """A weight kept for NaN takes its fused siblings along: engines load them as one."""
    if not any(d.reason == "non-finite" for d in decisions):
        return decisions
    for fused_set, members in _fused_groups(decisions, fused):
        if any(decisions[i].reason == "non-finite" for i in members):
            for i in members:
                if decisions[i].request:
                    evidence = f"fused with a non-finite weight as {fused_set.name}"
                    decisions[i] = decisions[i].kept("non-finite", evidence)
    return decisions


@lru_cache(maxsize=1024)
def _label(request: Request) -> str:
    return request.label


def _says(decision: Decision) -> str:
    return _label(decision.request) if decision.request else f"kept ({decision.reason})"


def _check_fused(decisions: Sequence[Decision], fused: Sequence[FusedSet], errors: list[QuantConvertError]) -> None:
    """vLLM and SGLang refuse a fused layer whose parts do not share one scheme; one refusal a kind of layer."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for fused_set, members in _fused_groups(decisions, fused):
        first = decisions[members[0]]
        if all(decisions[i].request is first.request and decisions[i].reason == first.reason for i in members):
            continue
        parts = {decisions[i].module.rpartition(".")[2]: _says(decisions[i]) for i in members}
        stem = decisions[members[0]].module.rpartition(".")[0]
        key = (template_of(stem), tuple(parts.values()))
        of_experts = any(decisions[i].is_expert and experts_of(decisions[i].module) for i in members)
        if len(set(parts.values())) < 2 or key in seen or of_experts:  # `_check_experts` speaks of the whole layer
            continue
        seen.add(key)
        tail = re.escape(stem.rpartition(".")[2])
        widest = max((decisions[i] for i in members), key=_width_rank)
        pattern = rf"re:.*{tail}\.({'|'.join(fused_set.members)})$"
        hint = (
            f"give all of them the widest: --rule '{pattern}={scheme_name(widest.request)}'" if widest.request else ""
        )
        errors.append(
            UnsupportedError(
                f"`{stem}`: engines load {', '.join(fused_set.members)} as one {fused_set.name}, so that they need one "
                f"scheme, got {', '.join(f'{name}: {said}' for name, said in parts.items())}",
                hint=hint or f"keep all of them: --ignore '{pattern}'",
            )
        )


def _width_rank(decision: Decision) -> int:
    return decision.request.num_bits if decision.request else 16


def _check_experts(decisions: Sequence[Decision], errors: list[QuantConvertError]) -> None:
    """vLLM and SGLang read one scheme for all routed experts of a layer (that of expert 0's first projection)."""
    if len({(id(d.request), d.reason) for d in decisions if d.is_expert}) < 2:
        return
    layers: dict[str, dict[str, Decision]] = {}
    for d in decisions:
        experts = experts_of(d.module) if d.is_expert else None
        if experts:
            layers.setdefault(experts, {}).setdefault(_says(d), d)
    mixed: dict[tuple[str, ...], list[str]] = {}
    for stem, kinds in layers.items():
        if len(kinds) > 1:
            mixed.setdefault((template_of(stem), *sorted(kinds)), []).append(stem)
    for (template, *_), stems in mixed.items():
        kinds = layers[stems[0]]
        found = ", ".join(f"`{d.module}`: {said}" for said, d in list(kinds.items())[:3])
        more = f" and {len(stems) - 1} more" if len(stems) > 1 else ""
        whole = len(stems) == sum(template_of(stem) == template for stem in layers)
        pattern = f"*.{template.rpartition('N.')[2]}.*" if whole else f"{stems[0]}.*"
        widest = max(kinds.values(), key=_width_rank).request
        errors.append(
            UnsupportedError(
                f"`{stems[0]}`{more}: engines read one scheme for all experts of a layer, got {found}",
                hint=f"give all of them the widest: --rule '{pattern}={scheme_name(widest)}'"
                if widest
                else f"keep all of them: --ignore '{pattern}'",
            )
        )
