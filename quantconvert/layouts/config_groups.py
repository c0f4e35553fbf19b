"""A config group of compressed-tensors: its part on weights and on activations, read and written.

Sources: compressed-tensors 0.20 `quantization/quant_args.py` (`QuantizationArgs`), `quant_scheme.py` (the presets) and
`config/base.py` (`CompressionFormat`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantconvert.number import Kind
from quantconvert.patterns import check_foreign, compile_pattern
from quantconvert.schemes import NUM_BITS, Scales, Scheme, Strategy, activations_problem

if TYPE_CHECKING:
    from quantconvert.checkpoint import TensorRef

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
_FLOAT_FORMATS = {(8, ""): FLOAT, (4, "e4m3"): NVFP4, (4, "e8m0"): MXFP4, (8, "e8m0"): MXFP8}
_SCALE_DTYPES: Mapping[Scales, str] = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


def is_plain(scheme: Scheme) -> bool:
    """Whether codes are written as int8, one a byte: W8A8."""
    return scheme.activations and scheme.num_bits == 8 and scheme.type == "int"


def format_of(scheme: Scheme) -> str:
    """The name of a scheme's compression."""
    if scheme.type == "float":
        return _FLOAT_FORMATS[scheme.num_bits, scheme.scales]
    return INT if is_plain(scheme) else PACKED


@dataclass(frozen=True, slots=True)
class Group:
    """A config group as read: whom it targets, its integer scheme (None for others), and its activations' part."""

    patterns: tuple[Callable[[str], bool], ...]
    scheme: Scheme | None
    activations: Mapping[str, Any] | None

    @classmethod
    def read(cls, group: Mapping[str, Any]) -> Group:
        weights = group.get("weights") or {}
        patterns = tuple(compile_pattern(check_foreign(str(target))) for target in group.get("targets") or ())
        size = weights.get("group_size")
        default = "tensor" if size is None else "group" if size > 0 else "channel"
        strategies: dict[str, Strategy] = {"tensor": "tensor", "channel": "channel", "group": "group"}
        strategy = strategies.get(weights.get("strategy") or default)
        if weights.get("type") == "float":
            return cls(patterns, _float_scheme(weights, group.get("input_activations")), group.get("input_activations"))
        integer = weights.get("type", "int") == "int" and weights.get("num_bits") in NUM_BITS
        scheme = None
        if integer and strategy and weights.get("actorder") != "group":
            symmetric = bool(weights.get("symmetric", True))
            scheme = Scheme(int(weights["num_bits"]), symmetric, strategy, size if strategy == "group" else None)
        return cls(patterns, scheme, group.get("input_activations"))

    def targets(self, name: str) -> bool:
        return any(matches(name) for matches in self.patterns)

    @property
    def is_static(self) -> bool:
        """Whether one stored scale serves the whole input."""
        return self._acts_like(inputs_of(STATIC))

    @property
    def input_type(self) -> Kind | None:
        """`float` where int4 weights are multiplied with float8 per token."""
        four = self.scheme is not None and (self.scheme.type, self.scheme.num_bits) == ("int", 4)
        return "float" if four and self._acts_like(inputs_of(FLOATING)) else None

    def _acts_like(self, arguments: Mapping[str, Any]) -> bool:
        acts = self.activations
        keys = ("num_bits", "type", "symmetric", "strategy", "dynamic")
        return acts is not None and all(acts.get(key, arguments[key]) == arguments[key] for key in keys)

    def only_dequantize(self, packed: bool, refs: Mapping[str, TensorRef]) -> str | None:
        """Why the activations' part would be lost or made up by another layout, if it would."""
        acts = self.activations
        if acts is None:
            return None if packed else "stores int8 without quantizing activations"
        scales = [refs[suffix].dtype for suffix in ("weight_scale", "input_scale") if suffix in refs]
        if len(set(scales)) > 1:
            return f"stores the scale of its weight as {scales[0]}, that of its input as {scales[1]}"
        same, scheme = self._acts_like(inputs_of(STATIC if "input_scale" in refs else DYNAMIC)), self.scheme
        floats = self.input_type == "float"
        eight = scheme is not None and scheme.num_bits == 8 and scheme.symmetric and not packed
        four = scheme is not None and scheme.num_bits == 4 and "input_scale" not in refs
        four = four and scheme is not None and activations_problem(scheme) is None
        if (same and (eight or four)) or (floats and four):
            return None
        return "quantizes activations in a way that no layout of ours says"


def _float_scheme(weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> Scheme | None:
    """The scheme of a config group of floats; None where it is none that is written here."""
    strategy, block, bits = weights.get("strategy"), weights.get("block_structure"), weights.get("num_bits")
    acting, size = activations is not None, weights.get("group_size")
    if strategy == "tensor_group" and (bits, size) == (4, 16):
        return Scheme(4, True, "group", 16, False, "float", scales="e4m3")
    if strategy == "group" and bits in NUM_BITS and size == 32:
        return Scheme(int(str(bits)), True, "group", 32, acting and bits == 8, "float", scales="e8m0")
    if bits != 8:
        return None
    if strategy == "block" and isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block):
        return Scheme(8, True, "block", None, acting, "float", block=(block[0], block[1]))
    known: dict[Any, Strategy] = {"tensor": "tensor", "channel": "channel"}
    return Scheme(8, True, known[strategy], None, acting, "float") if strategy in known else None


DYNAMIC = Scheme(8, True, "channel", activations=True)
STATIC = replace(DYNAMIC, static=True)
FLOATING = replace(DYNAMIC, input_type="float")


def inputs_of(scheme: Scheme) -> dict[str, Any]:
    """`input_activations` of a scheme that quantizes them."""
    if scheme.block:
        return _arguments(8, "float", True, "group", scheme.block[1], dynamic=True)
    if scheme.scales:
        found = _arguments(8, "float", True, "group", scheme.group_size, dynamic=True)
        return found | {"scale_dtype": _SCALE_DTYPES[scheme.scales]}
    strategy = "tensor" if scheme.static else "token"
    return _arguments(8, scheme.input_type or scheme.type, True, strategy, None, dynamic=not scheme.static)


def weights_of(scheme: Scheme) -> dict[str, Any]:
    """`weights` of a scheme."""
    strategy = "tensor_group" if scheme.scales == "e4m3" else scheme.strategy
    found = _arguments(scheme.num_bits, scheme.type, scheme.symmetric, strategy, scheme.group_size)
    if scheme.scales:
        found["scale_dtype"] = _SCALE_DTYPES[scheme.scales]
    return found | ({"block_structure": list(scheme.block)} if scheme.block else {})


def _arguments(
    num_bits: int, kind: Kind, symmetric: bool, strategy: str, group_size: int | None, dynamic: bool = False
) -> dict[str, Any]:
    """compressed-tensors `QuantizationArgs`; unknown keys are forbidden there."""
    return {
        "num_bits": num_bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
