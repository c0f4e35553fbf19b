"""What was asked: scheme, format, rules and limits; a value with a digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantconvert.errors import UsageError
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import FourOverSix
from quantconvert.options import (
    Activations,
    JobOptions,
    NanPolicy,
    OnIndivisible,
    Option,
    PlainDType,
    check_values,
    read_group,
)
from quantconvert.rules import Rule
from quantconvert.schemes import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_REQUEST,
    NUM_BITS,
    Request,
    parse_scheme,
    scheme_name,
    width_of,
)

Operation = Literal["convert", "repack", "dequantize"]
# Options that `Job.base` stands for.
BASE_OPTIONS = ("bits", "group_size", "symmetric", "scheme")


@dataclass(frozen=True, slots=True)
class Limits:
    """What may change the speed of a conversion, never its bytes."""

    workers: int = 0
    memory_limit: int = 2_000_000_000
    executor: str = "threads"


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion as asked for: a field an option of `JobOptions`, checked, but for `base`, which stands for four.

    `symmetric` None in `base` and `format` `auto` are settled by the plan; max_shard_size and memory_limit are bytes.
    Made by `from_options`, which has the defaults. activations: of `repack`, what inputs are quantized to from now on.
    """

    base: Request
    format: str
    ignore: tuple[str, ...]
    rules: tuple[Rule, ...]
    preset: str | None
    target_bits: float | None
    engines: tuple[str, ...]
    method: str
    equalize: bool | None
    smooth: float | None
    steps: tuple[str, ...]
    statistics: str | None
    rotate: Literal["r1", "r2", "r1,r2"] | None
    tensor_parallel: int
    on_indivisible: OnIndivisible
    nan_policy: NanPolicy
    requantize: bool
    strict: bool
    allow_incomplete: bool
    allow_kept_experts: bool
    max_shard_size: int
    memory_limit: int
    workers: int
    executor: str
    base_model: str | None
    operation: Operation = "convert"
    dtype: PlainDType | None = None
    activations: Activations | None = None

    @property
    def limits(self) -> Limits:
        return Limits(self.workers, self.memory_limit, self.executor)

    @property
    def step_names(self) -> tuple[str, ...]:
        """The registered kinds of steps that weights take, in order."""
        return step_names(self.rotate, self.steps)

    def to_json(self) -> dict[str, Any]:
        """Everything that can change bytes, as plain JSON values."""
        options = read_group(JobOptions)
        values = dataclasses.asdict(self)
        return {
            name: options[name].option.shareable(value) if name in options else value
            for name, value in values.items()
            if name not in options or options[name].option.changes
        }

    def asked(self) -> dict[str, Any]:
        """The options that differ from their defaults, in one spelling: `from_options` makes the same job of them."""
        options = {key: value for key, value in read_group(JobOptions).items() if key not in BASE_OPTIONS}
        values = {key: getattr(self, key) for key in options}
        return _base_options(self.base) | {k: v for k, v in values.items() if v != options[k].option.default}

    def words(self) -> list[str]:
        """The command line's words for what differs from the defaults and can change bytes of the result."""
        options, asked = read_group(JobOptions), self.asked()
        shown = (key for key, value in options.items() if _is_recorded(key, value.option))
        return [word for key in shown if key in asked for word in options[key].as_words(asked[key])]

    def request(self, name: str) -> Request | None:
        """What the scheme `name` of a rule asks for; None for `skip`. An open width is the job's own group size."""
        if name == "skip":
            return None
        base = self.base
        if base.type == "float" or (base.activations and base.num_bits == 8):  # whose channels are no choice of a width
            return parse_scheme(name, DEFAULT_GROUP_SIZE)
        return parse_scheme(name, _group_size(self.base))

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any],
        operation: Operation = "convert",
        dtype: PlainDType | None = None,
        activations: Activations | None = None,
    ) -> Job:
        """Check `JobOptions` and fill in the defaults; raises `UsageError`."""
        values = check_values(JobOptions, options)
        asked = {key: values.pop(key) for key in BASE_OPTIONS if key in values}
        layout = LAYOUTS.get(str(values.get("format", "auto")))
        if layout and layout.default_scheme and all(value is None for value in asked.values()):
            asked["scheme"] = layout.default_scheme
        base = _base(asked)
        defaults = {key: value.option.default for key, value in read_group(JobOptions).items()}
        filled = {key: values.get(key, default) for key, default in defaults.items() if key not in BASE_OPTIONS}
        job = cls(base=base, operation=operation, dtype=dtype, activations=activations, **filled)
        requests = [job.base, *(job.request(rule.scheme) for rule in job.rules)]
        if "method" not in values and any(request and request.scales == "e4m3" for request in requests):
            job = dataclasses.replace(job, method=FourOverSix.name)
        if job.smooth is not None and (job.equalize or job.rotate):
            other = "--equalize" if job.equalize else "--rotate"
            raise UsageError(f"--smooth contradicts {other}: both say what to do with columns", hint="give one of them")
        if job.rotate and job.statistics is not None:
            raise UsageError(
                f"--statistics contradicts --rotate {job.rotate}: they are of inputs as the model has them, not turned",
                hint="drop one of them",
            )
        if job.rotate and job.equalize:
            raise UsageError(
                f"--rotate {job.rotate} contradicts --equalize: a rotation leaves no channel louder than the others",
                hint="give one of them: --equalize for int4, --rotate for W8A8",
            )
        return job


def step_names(rotate: str | None, steps: tuple[str, ...]) -> tuple[str, ...]:
    """What `--rotate` and `--step` ask for, in the order in which it is done."""
    return (*(rotate.split(",") if rotate else ()), *steps)


def _is_recorded(name: str, option: Option) -> bool:
    return option.changes or option.in_card or name in BASE_OPTIONS


def _base(options: Mapping[str, Any]) -> Request:
    """The scheme of every layer without a rule; a scheme's name may be refined by single options, not contradicted."""
    bits, size, symmetric, name = (options.get(key) for key in BASE_OPTIONS)
    if bits not in (None, *NUM_BITS):
        raise UsageError(f"--bits: expected 4 or 8, got {bits!r}")
    if not name:
        strategy, group = width_of(DEFAULT_GROUP_SIZE if size is None else size)
        return Request(bits or DEFAULT_REQUEST.num_bits, strategy, group, symmetric)
    request = parse_scheme(name, DEFAULT_GROUP_SIZE if size is None else size, "scheme")
    if bits not in (None, request.num_bits) or symmetric not in (None, request.symmetric):
        raise UsageError(f"--scheme {name} contradicts --bits or --symmetric/--asymmetric", hint="give one of them")
    if size is not None and (request.strategy, request.group_size) != width_of(size):
        raise UsageError(f"--scheme {name} contradicts --group-size {size}", hint="give one of them")
    return request


def _base_options(base: Request) -> dict[str, Any]:
    """`_base` the other way: what of it differs from the default."""
    if base.activations or base.type == "float":
        return {"scheme": scheme_name(base)}
    values = {"bits": base.num_bits, "group_size": _group_size(base), "symmetric": base.symmetric}
    usual = {"bits": DEFAULT_REQUEST.num_bits, "group_size": _group_size(DEFAULT_REQUEST), "symmetric": None}
    return {key: value for key, value in values.items() if value != usual[key]}


def _group_size(base: Request) -> int:
    """As `--group-size` says it: -1 per channel, 0 per tensor."""
    return {"channel": -1, "tensor": 0}.get(base.strategy, base.group_size or 0)
