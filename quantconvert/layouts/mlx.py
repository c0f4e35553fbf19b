"""mlx: Apple's MLX, as mlx-lm reads it (affine mode).

For a module `M` with weight [O, I], groups of S columns, G = I / S:
    M.weight  uint32 [O, I*b/32]: neighbours in a row share a word, the first in the lowest bits
    M.scales  M.biases  the weight's dtype, [O, G]
`w = code * scale + bias`: what is -zero_point * scale elsewhere is stored as one number. Of symmetric weights it is a
power of two times the scale, and exact; otherwise it is rounded to the weight's dtype (of bfloat16 by 2^-8 of itself).

config.json says it twice: as `quantization`, which mlx-lm reads, and as `quantization_config`, where `zero_points` says
that biases come of whole ones, which can be had back.

Sources: mlx-lm `utils.py` (`load_model`, `quantize_model`) and mlx `mlx/ops.cpp` (`affine_quantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantconvert.errors import CheckpointError, UnsupportedError
from quantconvert.layouts.base import Layout, ModuleReader, Selection, Stored, TensorSpec
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.quantized import Quantized

GROUPS = (32, 64, 128)
# Half the distance of a number to the next, over the number.
_HALF_ULP = {"BF16": 2.0**-8, "F16": 2.0**-11}
# What mlx-lm does not know.
_OURS = ("quant_method", "symmetric", "zero_points")
_WHY = "MLX's biases are any numbers, where other layouts have whole zero points"


class Mlx(Layout):
    name = "mlx"
    summary = "int4 or int8 as MLX has it, with biases"
    suffixes = frozenset({"weight", "scales", "biases"})
    scale_suffix = "scales"
    symmetric_by_default = False
    tensors_tell = True

    def is_symmetric(self, num_bits: int) -> bool:
        """int8 alone: a bias that is rounded to bfloat16 moves its codes by half a step."""
        return num_bits == 8

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        found = []
        if scheme.activations:
            found.append("mlx is weight-only")
        if scheme.group_size not in GROUPS:
            found.append(f"mlx has groups of 32, 64 or 128, no {scheme.label}")
        if scheme.num_bits == 8 and not scheme.symmetric:
            found.append("mlx holds 8 bits symmetric only: its biases are too coarse")
        return found

    def mix_problem(self, schemes: Sequence[Scheme]) -> str | None:
        return None

    def row_multiple(self, scheme: Scheme) -> int:
        return 1

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        groups = rows, scheme.num_groups(columns)
        return (
            TensorSpec("weight", "U32", (rows, columns * scheme.num_bits // 32)),
            TensorSpec("scales", self.scale_dtype(weight_dtype), groups),
            TensorSpec("biases", self.scale_dtype(weight_dtype), groups),
        )

    def slack(self, scheme: Scheme, scale_dtype: str) -> float:
        return 0.0 if scheme.symmetric else scheme.number.top * _HALF_ULP.get(scale_dtype, 0.0)

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        import torch

        from quantconvert.layouts.packing import pack_columns

        biases = _biases(quantized.zero_points(), quantized.scale)
        words = pack_columns(quantized.codes, scheme.num_bits).view(torch.uint32)
        return {"weight": words, "scales": quantized.scale, "biases": biases}

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        import torch

        from quantconvert.layouts.packing import unpack_columns
        from quantconvert.quantized import Quantized

        scheme, scale = stored.scheme, blocks["scales"]
        offset: Tensor | None = blocks["biases"]
        codes = unpack_columns(blocks["weight"].view(torch.int32), scheme.num_bits, stored.shape[1])
        if stored.only_dequantize is None and offset is not None:
            zeros = (-offset.float() / scale.float()).round_().nan_to_num_(-1)
            whole = bool(((zeros >= 0) & (zeros <= scheme.number.top)).all())
            if whole and torch.equal(_biases(zeros, scale), offset):
                offset = None if scheme.symmetric and bool((zeros == scheme.number.midpoint).all()) else zeros.byte()
        return Quantized(codes, scale, offset, scheme.number)

    def dequantize(self, quantized: Quantized) -> Tensor:
        """With biases as they are stored."""
        from quantconvert.quantized import dequantize

        if not quantized.has_bias:
            quantized = replace(quantized, offset=_biases(quantized.zero_points(), quantized.scale))
        return dequantize(quantized)

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        """Biases do not show which weights are symmetric: of those of other tools none counts as such."""
        if block.get("mode", "affine") != "affine":
            raise UnsupportedError(f"MLX of mode `{block.get('mode')}`: expected `affine`")

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if not {"weight", "scales"} <= set(refs):
                return None
            fields = own if isinstance(own := block.get(module), dict) else block
            if "biases" not in refs or fields.get("mode", "affine") != "affine":
                raise UnsupportedError(f"`{module}` is MLX of mode `{fields.get('mode')}`: expected `affine`")
            bits, size = int(fields["bits"]), int(fields["group_size"])
            if bits not in (4, 8) or refs["weight"].dtype != "U32":
                raise UnsupportedError(f"`{module}` has MLX codes of {bits} bits: expected 4 or 8")
            rows, words = refs["weight"].shape
            columns = words * 32 // bits
            if size < 1 or refs["scales"].shape != (rows, columns // size):
                raise CheckpointError(f"`{module}`: expected scales of [{rows}, {columns // max(size, 1)}]")
            scheme = Scheme(bits, fields.get("symmetric") is True, "group", size)
            return Stored(
                module, scheme, (rows, columns), refs, only_dequantize=None if block.get("zero_points") else _WHY,
                scale_suffix="scales",
            )  # fmt: skip

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        base = max(selection.schemes, key=lambda scheme: len(selection.schemes[scheme]))
        config: dict[str, Any] = {"quant_method": self.name, **_fields(base), "zero_points": True}
        for scheme, names in selection.schemes.items():
            if scheme != base:
                config |= {name: _fields(scheme) for name in names}
        return config

    def beside(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """Without what mlx-lm does not know: it hands all fields of a module to its constructor."""
        fields = {name: _known(value) if isinstance(value, dict) else value for name, value in block.items()}
        return {"quantization": _known(fields)}

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        """None: what has no scales is plain."""
        return lambda module: False


def _biases(zero_points: Tensor, scale: Tensor) -> Tensor:
    return (-zero_points.float() * scale.float()).to(scale.dtype)


def _fields(scheme: Scheme) -> dict[str, Any]:
    fields = {"group_size": scheme.group_size, "bits": scheme.num_bits, "mode": "affine"}
    return fields | {"symmetric": True} if scheme.symmetric else fields


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _OURS}
