"""Name patterns: the user's (`--ignore`) and the ones that go into a config for engines to match.

A user's pattern is an exact module name, a glob (`*.down_proj`), or a regular expression after `re:`, matched at
the start of the name only, as compressed-tensors does (`compressed_tensors/utils/match.py`).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from sys import intern

from quantconvert.errors import UnsupportedError, UsageError
from quantconvert.text import quoted

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
WEIGHT_SUFFIX = ".weight"
MAX_PATTERN_LENGTH, MAX_REPEATS = 10_000, 8


def module_of(name: str) -> str:
    """The module a tensor belongs to: the name without its last part when that is `weight` or `bias`."""
    stem, _, last = name.rpartition(".")
    return stem if stem and last in ("weight", "bias") else name


@lru_cache(maxsize=1 << 20)
def template_of(name: str) -> str:
    """The name with every numeric part replaced by `N`: tensors of all layers share one template."""
    if "." in name and name[0].isdecimal():
        return intern(_NUMBER.sub(".N", f".{name}")[1:])
    return intern(_NUMBER.sub(".N", name))


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|albert_layers)\.\d+\.")


def layer_of(name: str) -> str | None:
    """The numbered layer that a tensor is in, `model.layers.3.`; None outside of layers."""
    match = _LAYER.search(name)
    return name[: match.end()] if match else None


_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def experts_of(module: str) -> str | None:
    """The experts that a module is in, `model.layers.3.mlp.experts`; None outside of experts."""
    match = _EXPERT.match(module)
    return match[1] if match else None


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """A predicate on names for one user pattern; raises `UsageError` for a regular expression that does not parse."""
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(f"pattern `{pattern}` is not a regular expression: {error}") from None
        return lambda name: regex.match(name) is not None
    if any(c in pattern for c in "*?["):
        regex = re.compile(fnmatch.translate(pattern))
        return lambda name: regex.match(name) is not None
    return lambda name: name == pattern


_ATOMS = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.S)
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")


def check_foreign(regex: str) -> str:
    """A regular expression from a source's config, if matching it cannot take exponential time.

    That takes a repeated group: `(a+)+`. No writer of configs needs one, or many repetitions. Raises
    `UnsupportedError`.
    """
    skeleton = _ATOMS.sub("x", regex[:MAX_PATTERN_LENGTH])
    if (
        len(regex) > MAX_PATTERN_LENGTH
        or re.search(r"\)[*+{]", skeleton)
        or len(_REPEAT.findall(skeleton)) > MAX_REPEATS
    ):
        raise UnsupportedError(f"quantization_config: pattern {quoted(regex)} could take forever to match")
    return regex


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like `pattern`, one a template, for the message that it matched nothing."""
    unique = {template_of(name): name for name in reversed(list(names))}
    bare = template_of(pattern.removeprefix("re:").replace("\\", "").replace("*", ""))
    return [unique[t] for t in difflib.get_close_matches(bare, list(unique), n=count, cutoff=0.26)]


def wider(pattern: str, names: Sequence[str]) -> tuple[str, int] | None:
    """The glob that an exact name was meant as, and how many of `names` it matches: `q_proj` as `*.q_proj`."""
    if pattern.startswith("re:") or any(c in pattern for c in "*?["):
        return None
    for glob in (f"*.{pattern}", f"*.{pattern}.*", f"{pattern}.*", f"*{pattern}*"):
        count = sum(map(compile_pattern(glob), names))
        if count:
            return glob, count
    return None


def cover(selected: Sequence[str], others: Sequence[str], fused: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Regular expressions (with the `re:` prefix) that match all of `selected` and none of `others`.

    Engines give the same layer different roots (`model.layers` / `language_model.model.layers`) and do not rename
    regular expressions, so each starts with `.*` and the shortest tail of the name that excludes all of `others`;
    numbers become `\\d+` when every layer agrees. Where all members of a fused set are selected, the engine's
    fused name is matched too.
    """
    theirs = _by_template(others)
    names: list[str] = []
    for template, members in _by_template(selected).items():
        names += [template] if template not in theirs else _numbered(template, members, theirs[template])
    return sorted({_tail_regex(name, theirs) for name in _merge_fused(names, fused)})


def _by_template(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    cut = -len(WEIGHT_SUFFIX)
    for name in names:
        # planning has asked for those of weights
        template = template_of(name + WEIGHT_SUFFIX)[:cut] if "." in name else template_of(name)
        found.setdefault(template, []).append(name)
    return found


def _numbered(template: str, members: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names for members of a template that `others` have too: `layers.(0|31).mlp...`, by their first number.

    Where a layer is split between both (experts of one layer), its members stand one by one.
    """
    parts = template.split(".")
    first = parts.index("N")
    theirs = {name.split(".", first + 1)[first] for name in others}
    mine = [name.split(".", first + 1)[first] for name in members]
    whole = [number for number in dict.fromkeys(mine) if number not in theirs]
    names = [name for name, number in zip(members, mine, strict=True) if number in theirs]
    if whole:
        parts[first] = f"({'|'.join(sorted(whole, key=int))})"
        names.append(".".join(parts))
    return names


def _merge_fused(templates: Sequence[str], fused: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Replace the members of each complete fused set by one name whose last part is `(a|b|fused)`."""
    left = dict.fromkeys(templates)
    for fused_name, members in fused:
        for template in list(left):
            stem, dot, last = template.rpartition(".")
            siblings = [f"{stem}{dot}{member}" for member in members]
            if last == members[0] and all(sibling in left for sibling in siblings):
                for sibling in siblings:
                    del left[sibling]
                left[f"{stem}{dot}({'|'.join((*members, fused_name))})"] = None
    return list(left)


# Multi-token prediction beside the model: `.*fc$` would speak of any module of that name.
_OWN_ROOTS = ("mtp", "mtp_block", "nextn")
_NUMBERS = re.compile(r"N|\d+|\(\d+(\|\d+)*\)")


def _tail_regex(name: str, other_templates: Iterable[str]) -> str:
    """`re:.*tail$` for the shortest dotted tail of `name`, from its last word before a number on, that is unique.

    Names of multi-token prediction begin with that word. Templates that differ from `name` in numbers alone are its own
    siblings, told apart by those numbers.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if _NUMBERS.fullmatch(part)]
    siblings = re.compile(r"\.".join(r"\w+" if i in numbers else _part_regex(part) for i, part in enumerate(parts)))
    number = re.search(r"\d+", parts[numbers[0]]) if numbers else None
    others = [t.replace(".N", f".{number[0] if number else 0}") for t in other_templates if not siblings.fullmatch(t)]
    rooted = next((i for i, part in enumerate(parts) if part in _OWN_ROOTS), len(parts))
    start = min(max((numbers[0] if numbers else len(parts)) - 1, 0), rooted)
    for first in range(start, -1, -1):
        regex = r"\.".join(_part_regex(part) for part in parts[first:]) + "$"
        matches = re.compile(".*" + regex).match
        if not any(map(matches, others)):
            return "re:.*" + regex
    return "re:" + regex


def _part_regex(part: str) -> str:
    if part == "N":
        return r"\d+"
    return part if part.startswith("(") else re.escape(part)
