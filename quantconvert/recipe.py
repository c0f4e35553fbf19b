"""A job as a TOML file: read with `--recipe`, printed by `quantconvert plan --write-recipe`.

    format = "compressed-tensors"
    scheme = "W4A16:g128"
    ignore = ["*.layers.0.*"]

    [[rule]]
    pattern = "*.down_proj"
    scheme = "W8A16"

Keys are options of `quantconvert.options` that a recipe may hold, but for `rules`, which are tables. Options of the
command line win.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from quantconvert.errors import UsageError
from quantconvert.job import BASE_OPTIONS, Job
from quantconvert.options import JobOptions, read_group
from quantconvert.rules import Rule
from quantconvert.schemes import DEFAULT_REQUEST

_OPTIONS = {name: value for name, value in read_group(JobOptions).items() if value.option.in_recipe}
_KEYS = sorted(set(_OPTIONS) - {"rules"})
_PRECISION = tuple(name for name in BASE_OPTIONS if name != "scheme")
_LISTS = tuple(name for name, value in _OPTIONS.items() if value.kind == "list")


def read_recipe(path: Path) -> dict[str, Any]:
    """The `JobOptions` in a recipe; raises `UsageError` for what is unreadable, unknown, or of the wrong shape."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--recipe: cannot read `{path}`: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe: `{path}` is not TOML: {error}") from None
    rules = values.pop("rule", [])
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise UsageError(f"--recipe: `{path}` has unknown key `{unknown[0]}`", hint=f"keys: rule, {', '.join(_KEYS)}")
    if not isinstance(rules, list) or not all(isinstance(r, dict) and set(r) == {"pattern", "scheme"} for r in rules):
        raise UsageError(f"--recipe: each [[rule]] in `{path}` needs exactly `pattern` and `scheme`")
    for key, value in values.items():
        try:
            values[key] = _OPTIONS[key].checked(value)
        except UsageError as error:
            raise UsageError(f"--recipe: `{key}` in `{path}`: {error.message}", hint=error.hint) from None
    if rules:
        values["rules"] = tuple(Rule(str(rule["pattern"]), str(rule["scheme"])) for rule in rules)
    return values


def merged(recipe: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line over a recipe's; rules and ignores of both count, the command line's last."""
    if options.get("scheme"):
        recipe = {key: value for key, value in recipe.items() if key not in _PRECISION}
    elif any(options.get(key) is not None for key in _PRECISION):
        recipe = {key: value for key, value in recipe.items() if key != "scheme"}
    result = {**recipe, **{key: value for key, value in options.items() if value is not None}}
    for key in _LISTS:
        result[key] = (*recipe.get(key, ()), *(options.get(key) or ()))
    return result


def write_recipe(job: Job, layout: str) -> str:
    """The recipe of a planned job, with the layout that `auto` chose and, unless a scheme says it, the precision."""
    asked = {key: value for key, value in job.asked().items() if key in _OPTIONS}
    values: dict[str, Any] = {"bits": DEFAULT_REQUEST.num_bits, "group_size": DEFAULT_REQUEST.group_size}
    values = {} if "scheme" in asked else values
    values |= asked | {"format": layout}
    rules = values.pop("rules", ())
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for rule in rules:
        lines += ["", "[[rule]]", f"pattern = {_toml(rule.pattern)}", f"scheme = {_toml(rule.scheme)}"]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
