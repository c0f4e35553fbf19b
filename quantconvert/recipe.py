"""A job as a TOML file: read with `--recipe`, printed by `quantconvert plan --write-recipe`.

    format = "compressed-tensors"
    scheme = "W4A16:g128"
    ignore = ["*.layers.0.*"]

    [[rule]]
    pattern = "*.down_proj"
    scheme = "W8A16"

Keys are those of `quantconvert.job.JobOptions`, but for `rules`, which are tables. Options of the command line win.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from quantconvert.errors import UsageError
from quantconvert.job import DEFAULT_SHARD_NBYTES, Job, JobOptions, Rule
from quantconvert.schemes import scheme_name

_KINDS: dict[str, tuple[type, ...]] = {
    "bits": (int,),
    "group_size": (int,),
    "symmetric": (bool,),
    "tensor_parallel": (int,),
    "max_shard_size": (int, str),
    "requantize": (bool,),
    "strict": (bool,),
    "allow_incomplete": (bool,),
}
_PRECISION = ("bits", "group_size", "symmetric")
_KEYS = set(JobOptions.__annotations__) - {"rules", "workers", "memory_limit"}


def read_recipe(path: Path) -> dict[str, Any]:
    """The `JobOptions` in a recipe; raises `UsageError` for what is unreadable, unknown, or of the wrong shape."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--recipe: cannot read `{path}`: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe: `{path}` is not TOML: {error}") from None
    rules = values.pop("rule", [])
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise UsageError(
            f"--recipe: `{path}` has unknown key `{unknown[0]}`", hint=f"keys: rule, {', '.join(sorted(_KEYS))}"
        )
    if not isinstance(rules, list) or not all(isinstance(r, dict) and set(r) == {"pattern", "scheme"} for r in rules):
        raise UsageError(f"--recipe: each [[rule]] in `{path}` needs exactly `pattern` and `scheme`")
    for key, value in values.items():
        kinds = _KINDS.get(key, (str,))
        items = value if key == "ignore" and isinstance(value, list) else [value]
        if not all(type(item) in kinds for item in items):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"--recipe: `{key}` in `{path}`: expected {names}, got `{value}`")
    if "ignore" in values:
        values["ignore"] = tuple(values["ignore"]) if isinstance(values["ignore"], list) else (values["ignore"],)
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
    for key in ("rules", "ignore"):
        result[key] = (*recipe.get(key, ()), *(options.get(key) or ()))
    return result


def write_recipe(job: Job, layout: str) -> str:
    """The recipe of a planned job, with the layout that `auto` chose."""
    values: dict[str, Any] = {"format": layout, "scheme": scheme_name(job.base)}
    if job.base.symmetric is None:
        values = {"format": layout, "bits": job.base.num_bits}
        values["group_size"] = {"channel": -1, "tensor": 0}.get(job.base.strategy, job.base.group_size)
    for key, default in (
        ("preset", None),
        ("tensor_parallel", 1),
        ("on_indivisible", "error"),
        ("nan_policy", "error"),
        ("requantize", False),
        ("strict", False),
        ("allow_incomplete", False),
    ):
        if getattr(job, key) != default:
            values[key] = getattr(job, key)
    if job.max_shard_nbytes != DEFAULT_SHARD_NBYTES:
        values["max_shard_size"] = job.max_shard_nbytes
    if job.ignore:
        values["ignore"] = list(job.ignore)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    for rule in job.rules:
        lines += [
            "",
            "[[rule]]",
            f"pattern = {json.dumps(rule.pattern, ensure_ascii=False)}",
            f'scheme = "{rule.scheme}"',
        ]
    return "\n".join(lines) + "\n"
