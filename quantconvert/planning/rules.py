"""Which scheme each weight gets: presets, then the user's rules in order, then `--ignore`; later ones win."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UsageError
from quantconvert.job import Job
from quantconvert.patterns import compile_pattern, module_of, nearest, wider
from quantconvert.planning.presence import count_key
from quantconvert.rules import PRESETS, Rule
from quantconvert.schemes import Request
from quantconvert.sources import Read
from quantconvert.text import counted

_LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|h|block|blocks))\.(\d+)\.")
MAX_STACKS = 64  # one pattern names them all


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one tensor: a request, or to skip it; `forced` when a rule names exactly this module."""

    request: Request | None
    evidence: str
    forced: bool = False


def expand(job: Job, checkpoint: Checkpoint, tensors: Sequence[Read]) -> tuple[Rule, ...]:
    """The preset's rules for this checkpoint, then the user's. Raises `UsageError` for an unknown preset."""
    if job.preset is None:
        return job.rules
    if job.preset not in PRESETS:
        raise UsageError(f"--preset: unknown preset `{job.preset}`", hint=f"known presets: {', '.join(PRESETS)}")
    return (*PRESETS[job.preset][1](_stacks(tensors, checkpoint.text_config)), *job.rules)


def _stacks(tensors: Sequence[Read], config: Mapping[str, Any]) -> dict[str, int]:
    """Each stack of layers with the number of its last one.

    Layers beyond the config's count (for multi-token prediction) are none. Raises `UsageError` for more stacks than
    models have.
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


def verdicts(
    checkpoint: Checkpoint, tensors: Sequence[Read], job: Job, errors: list[QuantConvertError]
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
        hits = _hits(tensors, rule.pattern, option, errors, f"={rule.scheme}")
        request, text = job.request(rule.scheme), f"{option} {rule.pattern}={rule.scheme}"
        for ref in hits:
            forced = rule.pattern in _names(ref)
            found[ref.name] = Verdict(request, text, forced)
    for pattern in job.ignore:
        for ref in _hits(tensors, pattern, "--ignore", errors):
            found[ref.name] = Verdict(None, f"--ignore {pattern}")
    return found


def _hits(
    tensors: Sequence[Read], pattern: str, option: str, errors: list[QuantConvertError], then: str = ""
) -> list[Read]:
    """Tensors that `pattern` matches by module or name; exact names and globs also by that of the stored tensor.

    option, then: what stands before and after the pattern on the command line.
    """
    try:
        matches = compile_pattern(pattern)
    except UsageError as error:
        errors.append(error)
        return []
    own = pattern.startswith("re:")  # a regular expression may exclude names; stored ones would slip through
    hits = [ref for ref in tensors if any(map(matches, _names(ref, own)))]
    if not hits:
        modules = list(dict.fromkeys(module_of(ref.name) for ref in tensors))
        hint = _missing_hint(pattern, option, then, modules)
        errors.append(UsageError(f"{option} `{pattern}{then}` matches no tensor", hint=hint))
    return hits


def _missing_hint(pattern: str, option: str, then: str, modules: Sequence[str]) -> str:
    """What may have been meant: a glob, as in tools that match parts of names, or a name like it."""
    found = wider(pattern, modules)
    if found:
        return f"a name alone is the whole name; {option} '{found[0]}{then}' matches {counted(found[1], 'module')}"
    close = nearest(pattern, modules)
    names = ", ".join(f"`{name}`" for name in close)
    return f"names like it: {names}" if close else "`quantconvert plan SRC --explain` lists the names"


def _names(source: Read, own: bool = False) -> set[str]:
    names = {source.name} if own else {source.name, source.values.name}
    return names | {module_of(name) for name in names}
