"""Schemes: how one weight is quantized, and the names that people give to that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from quantconvert.errors import UsageError
from quantconvert.number import CodeType, Kind, code_type

Strategy = Literal["tensor", "channel", "group", "block"]
# What scales are stored as, where that is not a dtype of weights: float8, under a scale of the whole layer that engines
# load as one (NVFP4), or powers of two (MX).
Scales = Literal["", "e4m3", "e8m0"]

NUM_BITS = (4, 8)
DEFAULT_GROUP_SIZE = 128
# Rows and columns that share a scale where the strategy is `block`: the one size that engines have kernels for.
BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight is quantized, in compressed-tensors' words: `num_bits`, `type` and `symmetric` name its `number`.

    `group_size` counts consecutive input columns that share a scale; None unless `strategy` is `group`.
    `block`: rows and columns that share one, None unless `strategy` is `block`; the last ones may be partial.
    `activations`: inputs are quantized too, to eight bits of the weights' kind, per token, while the model runs (W8A8,
    W4A8, FP8_DYNAMIC; with blocks by groups of a token's columns); nothing is stored for it, unless they are `static`:
    then one scale serves the whole input of a module, found before and stored beside. `scales`: how they are stored.
    `input_type`: the kind of activations, where it is another than the weights' (W4AFP8).
    """

    num_bits: int
    symmetric: bool
    strategy: Strategy
    group_size: int | None = None
    activations: bool = False
    type: Kind = "int"
    static: bool = False
    block: tuple[int, int] | None = None
    scales: Scales = ""
    input_type: Kind | None = None

    @property
    def number(self) -> CodeType:
        """What a code is."""
        return code_type(self.type, self.num_bits, self.symmetric)

    @property
    def label(self) -> str:
        """For people: `int4 g128 asymmetric`."""
        width = f"g{self.group_size}" if self.strategy == "group" else f"per {self.strategy}"
        width = "in blocks of {} x {}".format(*self.block) if self.block else width
        acts = (
            f", {'static ' if self.static else ''}{self.input_type or self.type}8 activations"
            if self.activations
            else ""
        )
        symmetry = "" if self.type == "float" else " symmetric" if self.symmetric else " asymmetric"
        scales = f", {self.scales} scales" if self.scales else ""
        return f"{self.type}{self.num_bits} {width}{symmetry}{scales}{acts}"

    def num_groups(self, in_features: int) -> int:
        """Scales a row: 1 per channel and per tensor."""
        if self.block:
            return -(-in_features // self.block[1])
        return in_features // self.group_size if self.group_size else 1


@dataclass(frozen=True, slots=True)
class Request:
    """A scheme as asked for: `symmetric` None means what the format does best."""

    num_bits: int
    strategy: Strategy
    group_size: int | None
    symmetric: bool | None = None
    activations: bool = False
    static: bool = False
    type: Kind = "int"
    block: tuple[int, int] | None = None
    scales: Scales = ""
    input_type: Kind | None = None

    @property
    def label(self) -> str:
        """As `Scheme.label`, without a word on symmetry that is still open."""
        label = self.settled(True).label
        return label.replace(" symmetric", "") if self.symmetric is None else label

    @lru_cache(maxsize=1024)  # noqa: B019 (a value; the cache is small)
    def settled(self, default: bool | Callable[[int], bool]) -> Scheme:
        """The scheme, with `default` (or what it says of so many bits) where the symmetry was left open."""
        usual = default if isinstance(default, bool) else default(self.num_bits)
        symmetric = usual if self.symmetric is None else self.symmetric
        width = self.strategy, self.group_size
        return Scheme(
            self.num_bits,
            symmetric,
            *width,
            self.activations,
            self.type,
            self.static,
            self.block,
            self.scales,
            self.input_type,
        )


DEFAULT_REQUEST = Request(4, "group", DEFAULT_GROUP_SIZE)
INTEGERS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A16_ASYM", "W8A8", "W8A8_STATIC", "W4A8", "W4AFP8")
FLOATS = ("FP8_DYNAMIC", "FP8_BLOCK", "FP8A16")
# Those whose scales are no dtype of weights: nothing of them is left open.
_SCALED: Mapping[str, Request] = {
    "NVFP4A16": Request(4, "group", 16, True, type="float", scales="e4m3"),
    "MXFP4A16": Request(4, "group", 32, True, type="float", scales="e8m0"),
    "MXFP8A16": Request(8, "group", 32, True, type="float", scales="e8m0"),
    "MXFP8": Request(8, "group", 32, True, True, type="float", scales="e8m0"),
}
SCHEMES = (*INTEGERS, *FLOATS, *_SCALED)
SCHEME_HINT = f"known schemes: {', '.join(SCHEMES)}; `:g64`, `:channel`, `:tensor` or `:block` may follow"
_SCHEME = re.compile(
    r"W(?P<bits>[48])A16(?P<asym>_ASYM)?(?::(?P<width>g\d+|channel|tensor))?"
    r"|W8A8(?P<static>_STATIC)?(?::(?P<whole>channel|tensor))?"
    r"|W4A(?:8|(?P<fp8>FP8))(?::(?P<part>g\d+|channel))?"
    r"|FP8(?:_DYNAMIC|(?P<only>A16))(?::(?P<float>channel|tensor|block))?|(?P<blocks>FP8_BLOCK)(?::block)?"
)


def activations_problem(scheme: Scheme) -> str | None:
    """Why weights under `scheme` are not multiplied with int8 activations; None where a name of `SCHEMES` says it."""
    without = "group" if scheme.num_bits == 8 else "tensor"
    if scheme.type == "float":
        return f"int8 activations go with whole numbers, not with {replace(scheme, activations=False).label}"
    if scheme.symmetric and scheme.strategy != without:
        return None
    weights = replace(scheme, activations=False)
    return (
        "int8 activations go with symmetric weights, int8 per channel or tensor (W8A8) or int4 by group or channel "
        f"(W4A8), not with {weights.label}"
    )


def parse_scheme(name: str, group_size: int, option: str = "rule") -> Request:
    """A request from a scheme's name; `group_size` (-1 channel, 0 tensor) where the name leaves the width open."""
    if name in _SCALED:
        return _SCALED[name]
    match = _SCHEME.fullmatch(name)
    if match is None:
        meant = _meant(name)
        hint = f"did you mean `{meant}`? {SCHEME_HINT}" if meant else SCHEME_HINT
        raise UsageError(f"--{option}: unknown scheme `{name}`", hint=hint)
    if name.startswith("FP8"):
        return _float8("block" if match["blocks"] else match["float"] or "channel", not match["only"])
    strategy: Strategy
    if name.startswith("W8A8"):
        strategy = "tensor" if match["whole"] == "tensor" else "channel"
        return Request(8, strategy, None, True, True, match["static"] is not None)
    width = match["width"] or match["part"]
    size = {"channel": -1, "tensor": 0}.get(width, int(width[1:]) if width and width[0] == "g" else group_size)
    strategy, group = width_of(size)
    if match["bits"]:
        return Request(int(match["bits"]), strategy, group, match["asym"] is None)
    if strategy == "tensor":
        raise UsageError(f"--{option}: W4A8 has scales by group or channel, not per tensor", hint="W4A8:g128")
    return Request(4, strategy, group, True, True, input_type="float" if match["fp8"] else None)


def _float8(width: str, activations: bool) -> Request:
    """float8 weights with a scale a channel, a tensor or a block."""
    strategies: dict[str, Strategy] = {"channel": "channel", "tensor": "tensor", "block": "block"}
    block = BLOCK if width == "block" else None
    return Request(8, strategies[width], None, True, activations, type="float", block=block)


def _meant(name: str) -> str | None:
    """The scheme that a name may have been meant as: `w4a16-64` as `W4A16:g64`, `int4` as `W4A16`."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    scaled = next((known for known in _SCALED if words and known.lower().startswith(words[0])), None)
    if scaled:
        return scaled
    if words and re.fullmatch(r"f(?:p|loat)?8(?:a16)?", words[0]):
        return next((known for known in FLOATS if known.lower().endswith(words[-1])), FLOATS[0])
    found = re.fullmatch(r"(?:w([48])a16|w([48])|int([48])|u?int([48]))", words[0]) if words else None
    bits = next((digit for digit in found.groups() if digit), None) if found else None
    if words and words[0] in ("w8a8", "w4a8"):
        bits = words[0][1:].upper() + ("_STATIC" if words[0] == "w8a8" and "static" in words else "")
    if bits is None:
        return None
    asymmetric = "_ASYM" if any(word.startswith("asym") for word in words) else ""
    stem = f"W{bits}" if "A8" in bits else f"W{bits}A16{asymmetric}"
    sizes = [word.removeprefix("g") for word in words[1:] if word.removeprefix("g").isdecimal()]
    width = next((word for word in words[1:] if word in ("channel", "tensor")), f"g{sizes[0]}" if sizes else "")
    meant = f"{stem}:{width}" if width else stem
    return meant if _SCHEME.fullmatch(meant) else None


def width_of(group_size: int) -> tuple[Strategy, int | None]:
    """Strategy and group size of `--group-size`; raises `UsageError`."""
    if group_size < -1 or (group_size > 0 and group_size % 8):
        raise UsageError(
            f"--group-size: expected a multiple of 8, -1 (per channel) or 0 (per tensor), got {group_size}",
            hint="engines read 32, 64 and 128",
        )
    if group_size > 0:
        return "group", group_size
    return ("channel" if group_size == -1 else "tensor"), None


def scheme_name(request: Request) -> str:
    """The name that `parse_scheme` reads back: `W8A16:g128`."""
    width = f"g{request.group_size}" if request.strategy == "group" else request.strategy
    if request.scales:
        return next(name for name, known in _SCALED.items() if known == request)
    if request.type == "float":
        if request.activations and request.block:
            return "FP8_BLOCK"
        return f"FP8{'_DYNAMIC' if request.activations else 'A16'}:{width}"
    if request.activations:
        return (
            f"W{request.num_bits}A{'FP8' if request.input_type else '8'}{'_STATIC' if request.static else ''}:{width}"
        )
    return f"W{request.num_bits}A16{'_ASYM' if request.symmetric is False else ''}:{width}"
