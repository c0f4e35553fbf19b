"""Which scheme each weight gets: presets, then the user's rules in order, then `--ignore`; later ones win."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UsageError
from quantconvert.job import Job, Rule
from quantconvert.patterns import compile_pattern, module_of, nearest
from quantconvert.schemes import Request
from quantconvert.sources import Source, Weight

_NOT_EXPERTS = r"re:(?!.*\.experts\.(expert_)?\d+\.)"
PRESETS: dict[str, tuple[str, Callable[[int], tuple[Rule, ...]]]] = {
    "first-last-8": (
        "first and last decoder layer at 8 bits",
        lambda layers: (Rule(rf"re:(.*\.)?(layers|layer|h|blocks)\.(0|{layers - 1})\..*", "W8A16"),),
    ),
    "down-8": (
        "down projections outside experts at 8 bits",
        lambda layers: (Rule(_NOT_EXPERTS + r".*\.(down_proj|w2|fc2|dense_4h_to_h|output\.dense)$", "W8A16"),),
    ),
    "experts-4-rest-8": (
        "routed experts at 4 bits, every other layer at 8",
        lambda layers: (Rule(_NOT_EXPERTS + ".*", "W8A16"),),
    ),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one tensor: a request, or to skip it; `forced` when a rule names exactly this module."""

    request: Request | None
    evidence: str
    forced: bool = False


def expand(job: Job, checkpoint: Checkpoint, tensors: Sequence[Source]) -> tuple[Rule, ...]:
    """The preset's rules for this checkpoint, then the user's. Raises `UsageError` for an unknown preset."""
    if job.preset is None:
        return job.rules
    if job.preset not in PRESETS:
        raise UsageError(f"--preset: unknown preset `{job.preset}`", hint=f"known presets: {', '.join(PRESETS)}")
    numbers = [int(m[1]) for ref in tensors if (m := _LAYER.search(ref.name))]
    count = checkpoint.text_config.get("num_hidden_layers") or max(numbers, default=0) + 1
    return (*PRESETS[job.preset][1](int(count)), *job.rules)


def verdicts(
    checkpoint: Checkpoint, tensors: Sequence[Source], job: Job, errors: list[QuantConvertError]
) -> dict[str, Verdict]:
    """Tensor name to what the last matching rule says; a rule without a match is a mistake worth stopping for."""
    found: dict[str, Verdict] = {}
    try:
        rules = expand(job, checkpoint, tensors)
    except UsageError as error:
        errors.append(error)
        return found
    own = len(rules) - len(job.rules)
    for i, rule in enumerate(rules):
        option = "--rule" if i >= own else "--preset"
        hits = _hits(tensors, rule.pattern, f"{option} `{rule.pattern}={rule.scheme}`", errors)
        request, text = job.request(rule.scheme), f"{option} {rule.pattern}={rule.scheme}"
        for ref in hits:
            forced = rule.pattern in _names(ref)
            found[ref.name] = Verdict(request, text, forced)
    for pattern in job.ignore:
        for ref in _hits(tensors, pattern, f"--ignore `{pattern}`", errors):
            found[ref.name] = Verdict(None, f"--ignore {pattern}")
    return found


def _hits(tensors: Sequence[Source], pattern: str, what: str, errors: list[QuantConvertError]) -> list[Source]:
    """Tensors that `pattern` matches by module or name; exact names and globs also by that of the stored tensor."""
    try:
        matches = compile_pattern(pattern)
    except UsageError as error:
        errors.append(error)
        return []
    own = pattern.startswith("re:")  # a regular expression may exclude names; stored ones would slip through
    hits = [ref for ref in tensors if any(map(matches, _names(ref, own)))]
    if not hits:
        close = nearest(pattern, [module_of(ref.name) for ref in tensors])
        hint = f"names like it: {', '.join(f'`{name}`' for name in close)}" if close else None
        errors.append(UsageError(f"{what} matches no tensor", hint=hint))
    return hits


def _names(source: Source, own: bool = False) -> set[str]:
    names = {source.name, source.values.name} if isinstance(source, Weight) and not own else {source.name}
    return names | {module_of(name) for name in names}
