"""What was asked: scheme, format, rules and limits; a value with a digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from quantconvert.errors import UsageError

Strategy = Literal["tensor", "channel", "group"]
OnIndivisible = Literal["error", "skip", "channel"]
NanPolicy = Literal["error", "keep"]

NUM_BITS = (4, 8)
DEFAULT_GROUP_SIZE = 128
DEFAULT_SHARD_NBYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight is quantized, in compressed-tensors' words.

    `group_size` counts consecutive input columns that share a scale; None unless `strategy` is `group`.
    """

    num_bits: int
    symmetric: bool
    strategy: Strategy
    group_size: int | None = None

    @property
    def label(self) -> str:
        """For people: `int4 g128 asymmetric`."""
        width = f"g{self.group_size}" if self.strategy == "group" else f"per {self.strategy}"
        return f"int{self.num_bits} {width} {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def preset(self) -> str:
        """The field's name for weight-only schemes: `W4A16`, `W4A16_ASYM`."""
        return f"W{self.num_bits}A16" + ("" if self.symmetric else "_ASYM")

    def num_groups(self, in_features: int) -> int:
        """Scales a row: 1 per channel and per tensor."""
        return in_features // self.group_size if self.group_size else 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What may change the speed of a conversion, never its bytes."""

    workers: int = 0
    memory_limit: int = 2_000_000_000


class JobOptions(TypedDict, total=False):
    """The keyword arguments of `quantconvert.plan` and `quantconvert.convert`; each is optional.

    bits: 4 (default) or 8. group_size: 128 (default), -1 per channel, 0 per tensor. symmetric: None (default) means
    what the format does best. scheme: a preset that sets the three at once (`W4A16`, `W4A16_ASYM`, `W8A16`, ...).
    format: `auto` (default) or a registered format. ignore: patterns of modules to leave alone. on_indivisible: what
    to do where the group size does not divide in_features. nan_policy: `error` (default) or `keep`. max_shard_size,
    memory_limit: bytes or text such as `5GB`. workers: threads, 0 = one a core. base_model: the id for the model
    card where it cannot be told from the source.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool | None
    scheme: str | None
    format: str
    ignore: tuple[str, ...]
    on_indivisible: OnIndivisible
    nan_policy: NanPolicy
    max_shard_size: int | str
    memory_limit: int | str
    workers: int
    base_model: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion as asked for; `symmetric` None and `format` `auto` are settled by the plan."""

    num_bits: int = 4
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool | None = None
    format: str = "auto"
    ignore: tuple[str, ...] = ()
    on_indivisible: OnIndivisible = "error"
    nan_policy: NanPolicy = "error"
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES
    base_model: str | None = None
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> dict[str, Any]:
        """Everything that can change bytes, as plain JSON values."""
        values = dataclasses.asdict(self)
        del values["limits"]
        return values

    @property
    def digest(self) -> str:
        """sha256 of `to_json`: equal for jobs that write the same bytes from the same source."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def scheme(self, symmetric: bool) -> Scheme:
        """The scheme of an ordinary linear layer, once the symmetry is settled."""
        if self.group_size > 0:
            return Scheme(self.num_bits, symmetric, "group", self.group_size)
        return Scheme(self.num_bits, symmetric, "channel" if self.group_size == -1 else "tensor")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Job:
        """Check `JobOptions` and fill in the defaults; raises `UsageError`."""
        unknown = set(options) - set(JobOptions.__annotations__)
        if unknown:
            raise UsageError(f"unknown option `{sorted(unknown)[0]}`")
        bits, group_size, symmetric = _precision(options)
        job = cls(
            num_bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            format=options.get("format") or "auto",
            ignore=tuple(options.get("ignore") or ()),
            on_indivisible=_choice("on-indivisible", options.get("on_indivisible") or "error", get_args(OnIndivisible)),
            nan_policy=_choice("nan-policy", options.get("nan_policy") or "error", get_args(NanPolicy)),
            max_shard_nbytes=parse_size(_given(options, "max_shard_size", DEFAULT_SHARD_NBYTES), "max-shard-size"),
            base_model=options.get("base_model"),
            limits=Limits(
                workers=int(options.get("workers") or 0),
                memory_limit=parse_size(_given(options, "memory_limit", Limits().memory_limit), "memory-limit"),
            ),
        )
        if job.limits.workers < 0:
            raise UsageError(f"--workers: expected 0 (one a core) or more, got {job.limits.workers}")
        return job


_PRESET = re.compile(r"W(4|8)A16(_ASYM)?(?::g(\d+)|:channel|:tensor)?")
PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A16_ASYM")


def _precision(options: Mapping[str, Any]) -> tuple[int, int, bool | None]:
    """bits, group_size and symmetric from a preset and the single options, which may refine but not contradict it."""
    bits, group_size, symmetric = (options.get(key) for key in ("bits", "group_size", "symmetric"))
    preset = options.get("scheme")
    if preset:
        match = _PRESET.fullmatch(preset)
        if match is None:
            raise UsageError(
                f"--scheme: unknown preset `{preset}`",
                hint=f"known presets: {', '.join(PRESETS)}; `:g64`, `:channel` or `:tensor` may follow",
            )
        preset_symmetric = match[2] is None
        if bits not in (None, int(match[1])) or symmetric not in (None, preset_symmetric):
            raise UsageError(
                f"--scheme {preset} contradicts --bits or --symmetric/--asymmetric", hint="give one of them"
            )
        bits, symmetric = int(match[1]), preset_symmetric
        width = int(match[3]) if match[3] else {"channel": -1, "tensor": 0}.get(preset.partition(":")[2])
        if width is not None and group_size not in (None, width):
            raise UsageError(f"--scheme {preset} contradicts --group-size {group_size}", hint="give one of them")
        group_size = width if width is not None else group_size
    bits = 4 if bits is None else bits
    group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if bits not in NUM_BITS:
        raise UsageError(f"--bits: expected 4 or 8, got {bits}")
    if group_size < -1 or (group_size % 8 and group_size > 0):
        raise UsageError(
            f"--group-size: expected a multiple of 8, -1 (per channel) or 0 (per tensor), got {group_size}",
            hint="engines read 32, 64 and 128",
        )
    return bits, group_size, symmetric


def _given(options: Mapping[str, Any], key: str, default: Any) -> Any:
    """The option's value, or `default` where it is absent or None (0 is a value)."""
    value = options.get(key)
    return default if value is None else value


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
