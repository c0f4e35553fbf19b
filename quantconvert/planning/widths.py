"""Group sizes against widths, whole or as tensor-parallel ranks will hold them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantconvert.errors import QuantConvertError, UnsupportedError
from quantconvert.families.parallel import Part, is_merged, part_of
from quantconvert.job import Job
from quantconvert.patterns import template_of
from quantconvert.planning.decision import Decision


def fit_widths(
    decisions: list[Decision], job: Job, config: Mapping[str, Any], errors: list[QuantConvertError]
) -> list[Decision]:
    """Check that every group size divides the in_features that a rank holds, and apply --on-indivisible where not."""
    ranks = job.tensor_parallel
    if ranks > 1:
        _check_heads(decisions, ranks, config, errors)
    widths: dict[int, int] = {}
    unsharded = []
    parts: dict[Hashable, Part | None] = {}  # of alike weights, which no number tells apart; whole, by their shape
    for i, d in enumerate(decisions):
        if d.request is None:
            continue
        kind = d.ref.shape if ranks == 1 else (template_of(d.ref.name), d.ref.shape)
        if kind not in parts:
            parts[kind] = part_of(d.module, d.ref.shape, 0, ranks, config)
        part = parts[kind]
        if part:
            widths[i] = part.columns[1] - part.columns[0]
        else:
            unsharded.append(d)
    _check_shardable(unsharded, ranks, errors)
    bad = [i for i, width in widths.items() if width % (_size(decisions[i]) or 1)]
    fixed = [
        i
        for i in bad
        if job.on_indivisible == "error" or (job.on_indivisible == "channel" and _is_scaled(decisions[i]))
    ]
    if fixed:
        errors.extend(_refusals(decisions, fixed, widths, ranks))
    for i in set(bad).difference(fixed):
        d = decisions[i]
        assert d.request
        if job.on_indivisible == "skip":
            decisions[i] = d.kept("indivisible", f"in_features {widths[i]} % group_size {_size(d)} != 0")
        elif job.on_indivisible == "channel":
            decisions[i] = d._replace(request=replace(d.request, strategy="channel", group_size=None))
    return decisions


def _check_heads(
    decisions: Sequence[Decision], ranks: int, config: Mapping[str, Any], errors: list[QuantConvertError]
) -> None:
    """Ranks hold whole attention heads, and layers of several projections cannot be cut as one."""
    heads, pairs = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and heads % ranks:
        errors.append(UnsupportedError(f"--tensor-parallel {ranks} does not divide num_attention_heads {heads}"))
    elif isinstance(pairs, int) and pairs > 0 and pairs % ranks and ranks % pairs:
        errors.append(UnsupportedError(f"--tensor-parallel {ranks} does not fit num_key_value_heads {pairs}"))
    merged = [d for d in decisions if d.request and is_merged(d.module)]
    if merged:
        errors.append(
            UnsupportedError(
                f"--tensor-parallel {ranks}: {len(merged)} layers hold several projections in one weight, such as "
                f"`{merged[0].module}`, and are not sharded here"
            )
        )


def _size(decision: Decision) -> int | None:
    return decision.request.group_size if decision.request else None


def _is_scaled(decision: Decision) -> bool:
    """Whether its scales go with groups of one size only."""
    return decision.request is not None and bool(decision.request.scales)


def _check_shardable(bad: Sequence[Decision], ranks: int, errors: list[QuantConvertError]) -> None:
    if bad:
        names = ", ".join(f"`{d.module}` {list(d.ref.shape)}" for d in bad[:3]) + (" ..." if len(bad) > 3 else "")
        errors.append(
            UnsupportedError(
                f"--tensor-parallel {ranks} does not divide {len(bad)} weights, so that no engine shards them: {names}",
                hint="choose a number of ranks that divides the model's heads and widths",
            )
        )


def _refusals(
    decisions: Sequence[Decision], bad: Sequence[int], widths: Mapping[int, int], ranks: int
) -> list[QuantConvertError]:
    """One refusal a group size, naming every kind of weight; the hint names the largest size that divides them all."""
    errors: list[QuantConvertError] = []
    for size in dict.fromkeys(_size(decisions[i]) for i in bad):
        assert size
        mine = [i for i in bad if _size(decisions[i]) == size]
        every = {width for i, width in widths.items() if _size(decisions[i]) == size}
        scaled = any(_is_scaled(decisions[i]) for i in mine)
        fitting = (
            None
            if scaled
            else next((g for g in (512, 256, 128, 64, 32, 16, 8) if g < size and not any(w % g for w in every)), None)
        )
        best = f"--group-size {fitting} divides every layer; or " if fitting else ""
        share = f" on each of {ranks} ranks" if ranks > 1 else ""
        kinds: dict[tuple[str, int], list[str]] = {}
        for i in mine:
            kinds.setdefault((template_of(decisions[i].ref.name), widths[i]), []).append(decisions[i].ref.name)
        lines = "".join(
            f"\n  `{names[0]}`: in_features {width}" if len(names) == 1
            else f"\n  `{template}`: in_features {width} ({len(names)} of them, N any number)"
            for (template, width), names in kinds.items()
        )  # fmt: skip
        errors.append(
            UnsupportedError(
                f"--group-size {size} does not divide in_features of {len(mine)} weights{share}:{lines}",
                hint="--on-indivisible skip (keep them in high precision)"
                if scaled
                else f"{best}--on-indivisible skip (keep them in high precision) or channel (one scale a row)",
            )
        )
    return errors
