"""rtn: the plain layout for authors of small engines. One page, no bit tricks.

For a module `M` with weight [O, I] and G groups (G = 1 per channel):
    M.weight             8 bit: int8 [O, I], -128 .. 127, symmetric; uint8 [O, I], 0 .. 255, asymmetric
                         4 bit: uint8 [ceil(O/2), I], codes 0 .. 15: byte row r holds output row 2r in the low nibble
                         and row 2r + 1 in the high nibble (0 past an odd last row)
    M.weight_scale       the weight's dtype, [O, G]; [1] per tensor
    M.weight_zero_point  uint8, same shape as the scale; only asymmetric (symmetric: 8 for int4, 0 for int8)
`w = (code - zero_point) * scale`. Decoder in ten lines of torch:

    def dequantize(weight, scale, zero_point, bits):
        if bits == 4:
            weight = torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1)
            weight = weight[: scale.shape[0]] if scale.dim() == 2 else weight
        scale = scale.view(-1, 1) if scale.dim() == 1 else scale
        zero = torch.full_like(scale, 8 if bits == 4 else 0) if zero_point is None else zero_point.view(scale.shape)
        size = weight.shape[1] // scale.shape[1]
        scale, zero = (x.repeat_interleave(size, dim=1) for x in (scale, zero))
        return (weight.int() - zero.int()).to(scale.dtype) * scale

In the spirit of vLLM's removed `rtn.py` (vllm PRs 18768, 20766, 26051).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantconvert.layouts.base import Layout, ModuleReader, Packed, Packing, Selection, Stored, TensorSpec
from quantconvert.patterns import check_foreign, cover
from quantconvert.schemes import Scheme, width_of

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.quantized import Quantized


class Simple(Layout):
    name = "rtn"
    summary = "plain int8, or int4 with two rows a byte, for small engines"
    suffixes = frozenset({"weight", "weight_scale", "weight_zero_point"})
    symmetric_by_default = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        found = []
        if scheme.activations:
            found.append("rtn is weight-only")
        if scheme.num_bits == 4 and scheme.strategy == "tensor" and shape[0] % 2:
            found.append(f"rtn cannot tell an odd number of rows from a per-tensor scale: got out_features {shape[0]}")
        return found

    def mix_problem(self, schemes: Sequence[Scheme]) -> str | None:
        return None

    def row_multiple(self, scheme: Scheme) -> int:
        return 2 if scheme.num_bits == 4 else 1

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        whole = scheme.strategy == "tensor"
        scales = ((1,), 0) if whole else ((rows, scheme.num_groups(columns)), 1)
        if scheme.num_bits == 4:
            weight = TensorSpec("weight", "U8", (-(-rows // 2), columns), 2)
        else:
            weight = TensorSpec("weight", "I8" if scheme.symmetric else "U8", (rows, columns))
        specs = [weight, TensorSpec("weight_scale", weight_dtype, *scales)]
        if not scheme.symmetric:
            specs.append(TensorSpec("weight_zero_point", "U8", *scales))
        return tuple(specs)

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        import torch

        from quantconvert.layouts.packing import pack_row_pairs

        whole = scheme.strategy == "tensor"
        codes = quantized.codes
        if scheme.num_bits == 4:
            codes = pack_row_pairs(codes)
        elif scheme.symmetric:
            codes = codes.bitwise_xor(scheme.number.midpoint).view(torch.int8)
        blocks = {"weight": codes, "weight_scale": quantized.scale.reshape(1) if whole else quantized.scale}
        if quantized.offset is not None:
            blocks["weight_zero_point"] = quantized.offset.reshape(1) if whole else quantized.offset
        return blocks

    def packing(self, scheme: Scheme) -> Packing:
        shift = -scheme.number.midpoint if scheme.symmetric else 0
        codes = Packed("weight", "pairs") if scheme.num_bits == 4 else Packed("weight", "bytes", shift=shift)
        return Packing(codes, None if scheme.symmetric else Packed("weight_zero_point", "bytes"))

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        import torch

        from quantconvert.layouts.packing import unpack_row_pairs
        from quantconvert.quantized import Quantized

        scheme = stored.scheme
        codes, scale = blocks["weight"], blocks["weight_scale"]
        if scheme.num_bits == 4:
            codes = unpack_row_pairs(codes, rows)
        elif scheme.symmetric:
            codes = codes.view(torch.uint8).bitwise_xor(scheme.number.midpoint)
        scale = scale.view(1, 1) if scheme.strategy == "tensor" else scale
        zero_point = None if scheme.symmetric else blocks["weight_zero_point"].view(scale.shape)
        return Quantized(codes, scale, zero_point, scheme.number)

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        given = (block.get("overrides") or {}).items()
        overrides = [(re.compile(check_foreign(pattern)), dict(fields)) for pattern, fields in given]

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if not {"weight", "weight_scale"} <= set(refs):
                return None
            fields = dict(block) | next((f for pattern, f in overrides if pattern.match(module)), {})
            (rows, columns), scales = refs["weight"].shape, refs["weight_scale"].shape
            strategy, group = width_of(int(fields["group_size"]))
            scheme = Scheme(int(fields["bits"]), bool(fields["symmetric"]), strategy, group)
            if scheme.num_bits == 4:
                rows = scales[0] if strategy != "tensor" else 2 * rows
            return Stored(module, scheme, (rows, columns), refs)

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        """`overrides`: regular expression on the module name to the fields that differ; the first match counts."""
        (base, *others) = sorted(selection.schemes, key=lambda s: -len(selection.schemes[s]))
        overrides: dict[str, dict[str, Any]] = {}
        for scheme in others:
            rest = [name for s, names in selection.schemes.items() if s != scheme for name in names]
            for pattern in cover(selection.schemes[scheme], [*rest, *selection.kept], ()):
                overrides[pattern.removeprefix("re:")] = _fields(scheme)
        return {
            "quant_method": "rtn",
            **_fields(base),
            "modules_to_not_convert": [
                pattern.removeprefix("re:") for pattern in cover(selection.kept, selection.quantized, ())
            ],
            "overrides": overrides,
        }

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        patterns = [re.compile(check_foreign(str(p))) for p in block.get("modules_to_not_convert") or ()]
        return lambda module: any(pattern.match(module) for pattern in patterns)


def _fields(scheme: Scheme) -> dict[str, Any]:
    size = {"channel": -1, "tensor": 0}.get(scheme.strategy, scheme.group_size)
    return {"bits": scheme.num_bits, "group_size": size, "symmetric": scheme.symmetric}
