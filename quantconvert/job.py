"""What was asked: scheme, format, rules and limits; a value with a digest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from quantconvert.errors import UsageError
from quantconvert.schemes import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_REQUEST,
    NUM_BITS,
    SCHEME_HINT,
    Request,
    parse_scheme,
    width_of,
)

OnIndivisible = Literal["error", "skip", "channel"]
NanPolicy = Literal["error", "keep"]

DEFAULT_SHARD_NBYTES = 5_000_000_000


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


@dataclass(frozen=True, slots=True)
class Limits:
    """What may change the speed of a conversion, never its bytes."""

    workers: int = 0
    memory_limit: int = 2_000_000_000


class StreamOptions(TypedDict, total=False):
    """Keyword arguments of everything that writes a checkpoint; see `JobOptions`."""

    max_shard_size: int | str
    memory_limit: int | str
    workers: int
    base_model: str | None


class JobOptions(TypedDict, total=False):
    """The keyword arguments of `quantconvert.plan` and `quantconvert.convert`; each is optional.

    bits: 4 (default) or 8. group_size: 128 (default), -1 per channel, 0 per tensor. symmetric: None (default) means
    what the format does best. scheme: a name that sets the three at once (`W4A16`, `W4A16_ASYM`, `W8A16`, `W8A8` ...).
    format: `auto` (default) or a registered format. ignore: patterns of modules to leave alone. rules:
    `PATTERN=SCHEME`, later ones win. preset: a named set of rules. tensor_parallel: ranks that every layer must divide
    by. on_indivisible: what to do where the group size does not divide in_features. nan_policy: `error` (default) or
    `keep`. requantize: quantize once more, to as many bits or fewer, what is quantized. strict: refuse to keep a linear
    weight in high precision for a reason outside its family's table. allow_incomplete: convert what is there of a
    source that lacks layers, embeddings or a head. max_shard_size, memory_limit: bytes or
    text such as `5GB`. workers: threads, 0 = one a core. base_model: the id for the model card where the source does
    not tell it.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool | None
    scheme: str | None
    format: str
    ignore: tuple[str, ...]
    rules: tuple[Rule | str, ...]
    preset: str | None
    tensor_parallel: int
    on_indivisible: OnIndivisible
    nan_policy: NanPolicy
    requantize: bool | None
    strict: bool | None
    allow_incomplete: bool | None
    max_shard_size: int | str
    memory_limit: int | str
    workers: int
    base_model: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion as asked for; `symmetric` None and `format` `auto` are settled by the plan."""

    base: Request = DEFAULT_REQUEST
    format: str = "auto"
    ignore: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    preset: str | None = None
    tensor_parallel: int = 1
    on_indivisible: OnIndivisible = "error"
    nan_policy: NanPolicy = "error"
    requantize: bool = False
    strict: bool = False
    allow_incomplete: bool = False
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES
    base_model: str | None = None
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> dict[str, Any]:
        """Everything that can change bytes, as plain JSON values."""
        values = dataclasses.asdict(self)
        for key in ("limits", "requantize", "strict", "allow_incomplete"):
            del values[key]
        return values

    def request(self, name: str) -> Request | None:
        """What the scheme `name` of a rule asks for; None for `skip`. An open width is the job's own group size."""
        if name == "skip":
            return None
        if self.base.activations:
            return parse_scheme(name, DEFAULT_GROUP_SIZE)
        return parse_scheme(name, {"channel": -1, "tensor": 0}.get(self.base.strategy, self.base.group_size or 0))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Job:
        """Check `JobOptions` and fill in the defaults; raises `UsageError`."""
        unknown = set(options) - set(JobOptions.__annotations__)
        if unknown:
            raise UsageError(f"unknown option `{sorted(unknown)[0]}`")
        job = cls(
            base=_base(options),
            format=options.get("format") or "auto",
            ignore=_several(options.get("ignore")),
            rules=tuple(r if isinstance(r, Rule) else Rule.parse(r) for r in _several(options.get("rules"))),
            preset=options.get("preset"),
            tensor_parallel=_count("tensor-parallel", _given(options, "tensor_parallel", 1), 1),
            on_indivisible=_choice("on-indivisible", options.get("on_indivisible") or "error", get_args(OnIndivisible)),
            nan_policy=_choice("nan-policy", options.get("nan_policy") or "error", get_args(NanPolicy)),
            requantize=bool(options.get("requantize")),
            strict=bool(options.get("strict")),
            allow_incomplete=bool(options.get("allow_incomplete")),
            max_shard_nbytes=parse_size(_given(options, "max_shard_size", DEFAULT_SHARD_NBYTES), "max-shard-size"),
            base_model=options.get("base_model"),
            limits=Limits(
                workers=_count("workers", _given(options, "workers", 0), 0),
                memory_limit=parse_size(_given(options, "memory_limit", Limits().memory_limit), "memory-limit"),
            ),
        )
        for rule in job.rules:
            job.request(rule.scheme)
        return job


def _base(options: Mapping[str, Any]) -> Request:
    """The scheme of every layer without a rule; a scheme's name may be refined by single options, not contradicted."""
    bits, size, symmetric, name = (options.get(key) for key in ("bits", "group_size", "symmetric", "scheme"))
    if bits not in (None, *NUM_BITS):
        raise UsageError(f"--bits: expected 4 or 8, got {bits!r}")
    if not name:
        strategy, group = width_of(DEFAULT_GROUP_SIZE if size is None else size)
        return Request(bits or 4, strategy, group, symmetric)
    request = parse_scheme(name, DEFAULT_GROUP_SIZE if size is None else size, "scheme")
    if bits not in (None, request.num_bits) or symmetric not in (None, request.symmetric):
        raise UsageError(f"--scheme {name} contradicts --bits or --symmetric/--asymmetric", hint="give one of them")
    if size is not None and (request.strategy, request.group_size) != width_of(size):
        raise UsageError(f"--scheme {name} contradicts --group-size {size}", hint="give one of them")
    return request


def _given(options: Mapping[str, Any], key: str, default: Any) -> Any:
    """The option's value, or `default` where it is absent or None (0 is a value)."""
    value = options.get(key)
    return default if value is None else value


def _several(value: Any) -> tuple[Any, ...]:
    """The values of a repeatable option; one alone needs no list."""
    return (value,) if isinstance(value, (str, Rule)) else tuple(value or ())


def _count(option: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise UsageError(f"--{option}: expected a whole number of at least {least}, got {value!r}")
    return value


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UsageError(f"--{option}: expected {', '.join(allowed)}, got `{value}`")
    return value


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(value: int | str, option: str) -> int:
    """Bytes from `5GB` (decimal), `512MiB` (binary) or a number; raises `UsageError` naming `--option`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(f"--{option}: expected a size such as `5GB` or `512MiB`, got `{value}`")
    return int(float(match[1]) * unit)
