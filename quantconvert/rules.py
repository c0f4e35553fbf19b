"""Rules: which modules get which scheme; and the presets, which are named sets of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantconvert.errors import UsageError
from quantconvert.schemes import SCHEME_HINT


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules that match `pattern` get the scheme that `scheme` names, or stay as they are when it is `skip`."""

    pattern: str
    scheme: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From `PATTERN=SCHEME`; raises `UsageError`."""
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern or not scheme:
            raise UsageError(f"--rule: expected PATTERN=SCHEME, got `{text}`", hint=f"{SCHEME_HINT}, or skip")
        return cls(pattern, scheme)

    def __str__(self) -> str:
        return f"{self.pattern}={self.scheme}"


_NOT_EXPERTS = r"re:(?!.*\.experts\.(expert_)?\d+\.)"


def _first_and_last(stacks: Mapping[str, int]) -> str:
    """One pattern for the outer layers of every stack; stacks of one length and last word share a part."""
    by_layers: dict[tuple[str, int], list[str]] = {}
    for stack, last in stacks.items():
        by_layers.setdefault((stack.rpartition(".")[2], last), []).append(stack)
    parts = [
        rf"({'|'.join(map(re.escape, sorted(names)))})\.({'|'.join(map(str, sorted({0, last})))})"
        for (_, last), names in by_layers.items()
    ]
    return rf"re:({'|'.join(parts)})\..*"


# By name: a sentence for people, and the rules for a model's stacks of layers (name to the number of its last).
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
