"""A layout with a float bias and no packing: `w = code * scale + bias`, as MLX computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantconvert.checkpoint import TensorRef
from quantconvert.layouts import Layout, Selection, Stored, TensorSpec
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme


class Biased(Layout):
    name = "toy-biased"
    summary = "a byte a code, float32 scales and biases"
    suffixes = frozenset({"codes", "toy_scales", "toy_biases"})
    scale_suffix = "toy_scales"
    symmetric_by_default = False

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        return ["toy-biased holds groups without symmetry"] if scheme.symmetric or scheme.strategy != "group" else []

    def row_multiple(self, scheme: Scheme) -> int:
        return 1

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F32"

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        groups = (shape[0], scheme.num_groups(shape[1]))
        return (
            TensorSpec("codes", "U8", shape),
            TensorSpec("toy_scales", "F32", groups),
            TensorSpec("toy_biases", "F32", groups),
        )

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        bias = -quantized.zero_points().float() * quantized.scale
        return {"codes": quantized.codes, "toy_scales": quantized.scale, "toy_biases": bias}

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        return Quantized(blocks["codes"], blocks["toy_scales"], blocks["toy_biases"], stored.scheme.number)

    def reader(
        self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]
    ) -> Callable[[str, Mapping[str, TensorRef]], Stored | None]:
        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            rows, columns = refs["codes"].shape
            scheme = Scheme(int(block["bits"]), False, "group", columns // refs["toy_scales"].shape[1])
            return Stored(module, scheme, (rows, columns), refs)

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        (scheme,) = selection.schemes
        return {"quant_method": self.name, "bits": scheme.num_bits, "kept": list(selection.kept)}

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        return lambda module: module in block["kept"]


class RoundedOffset(Biased):
    """Wrong: the bias loses bits that the codes count on."""

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        blocks = super().encode(quantized, scheme, shape)
        return blocks | {"toy_biases": (blocks["toy_biases"] * 64).round() / 64}


class RoundedScale(Biased):
    """Wrong: codes are for other scales than those that are stored."""

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        blocks = super().encode(quantized, scheme, shape)
        return blocks | {"toy_scales": blocks["toy_scales"].to(torch.float8_e5m2).float()}


class SwappedPairs(Biased):
    """Wrong: the two codes of what would be a byte have changed places."""

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        blocks = super().encode(quantized, scheme, shape)
        pairs = blocks["codes"].view(blocks["codes"].shape[0], -1, 2)
        return blocks | {"codes": pairs.flip(-1).reshape(blocks["codes"].shape).contiguous()}


TOY = Biased()
