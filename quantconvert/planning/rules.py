"""Which scheme each weight gets: presets, then the user's rules in order, then `--ignore`; later ones win."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UsageError
from quantconvert.job import Job, Rule
from quantconvert.patterns import compile_pattern, module_of, nearest
from quantconvert.planning.presence import count_key
from quantconvert.schemes import Request
from quantconvert.sources import Source, Weight

_NOT_EXPERTS = r"re:(?!.*\.experts\.(expert_)?\d+\.)"
_EXPERT = re.compile(r"\.experts\.(expert_)?\d+\.")
# What each does, and its rules for stacks of layers: the stack's name to the number of its last layer.
PRESETS: dict[str, tuple[str, Callable[[Mapping[str, int]], tuple[Rule, ...]]]] = {
    "first-last-8": (
        "first and last decoder layer at 8 bits",
        lambda stacks: (Rule(_first_and_last(stacks), "W8A16"),),
    ),
    "down-8": (
        "down projections outside experts at 8 bits",
        lambda _: (Rule(_NOT_EXPERTS + r".*\.(down_proj|w2|fc2|dense_4h_to_h|output\.dense)$", "W8A16"),),
    ),
    "experts-4-rest-8": (
        "routed experts at 4 bits, every other layer at 8",
        lambda _: (Rule(_NOT_EXPERTS + ".*", "W8A16"),),
    ),
}
MAX_STACKS = 64  # one pattern names them all
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|h|block|blocks))\.(\d+)\.")


def _first_and_last(stacks: Mapping[str, int]) -> str:
    """One pattern for the outer layers of every stack; stacks of one length that differ in their roots share a part."""
    by_layers: dict[tuple[str, int], list[str]] = {}
    for stack, last in stacks.items():
        by_layers.setdefault((stack.rpartition(".")[2], last), []).append(stack)
    parts = [
        rf"({'|'.join(map(re.escape, sorted(names)))})\.({'|'.join(map(str, sorted({0, last})))})"
        for (_, last), names in by_layers.items()
    ]
    return rf"re:({'|'.join(parts)})\..*"


def _stacks(tensors: Sequence[Source], config: Mapping[str, Any]) -> dict[str, int]:
    """Each stack of layers with the number of its last one; layers beyond the config's count (for multi-token
    prediction) are none of them. Raises `UsageError` for more stacks than models have.
    """
    last: dict[str, int] = {}
    for match in filter(None, (_LAYER.match(ref.name) for ref in tensors)):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    if len(last) > MAX_STACKS:
        raise UsageError(f"--preset: expected at most {MAX_STACKS} stacks of layers, got {len(last)}")
    for stack, number in last.items():
        key = count_key(stack, config)
        last[stack] = min(number, config[key] - 1) if key and config[key] else number
    return last


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one tensor: a request, or to skip it; `forced` when a rule names exactly this module."""

    request: Request | None
    evidence: str
    forced: bool = False


def expand(job: Job, checkpoint: Checkpoint, tensors: Sequence[Source]) -> tuple[Rule, ...]:
    """The preset's rules for this checkpoint, then the user's.

    Raises `UsageError` for an unknown preset, and for one about experts where there are none.
    """
    if job.preset is None:
        return job.rules
    if job.preset not in PRESETS:
        raise UsageError(f"--preset: unknown preset `{job.preset}`", hint=f"known presets: {', '.join(PRESETS)}")
    if job.preset == "experts-4-rest-8" and not any(_EXPERT.search(ref.name) for ref in tensors):
        raise UsageError(
            f"--preset {job.preset}: `{checkpoint.location}` has no routed experts to quantize",
            hint="--bits 8 quantizes every layer to 8 bits; --preset down-8 or first-last-8 mixes both",
        )
    return (*PRESETS[job.preset][1](_stacks(tensors, checkpoint.text_config)), *job.rules)


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
