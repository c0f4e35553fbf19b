"""compressed-tensors: `pack-quantized` (int4 with or without int8 activations, weight-only int8), `int-quantized`
(int8 with int8 activations), and floats: `float-quantized`, `nvfp4-pack-quantized` and the MX formats
(`layouts/floats.py`).

For a module `M` with weight [O, I], b bits, G groups, `pack-quantized` is
    M.weight_packed int32 [O, ceil(I*b/32)]     codes stored unsigned (q + 2^(b-1)), first value in the lowest bits
    M.weight_scale  weight's dtype [O, G]       [O, 1] per channel, [1] per tensor
    M.weight_shape  int64 [2] = [O, I]          always: transformers fails without it
    M.weight_zero_point int32 [ceil(O*b/32), G] only asymmetric, packed along the output; int8 [1] per tensor
and `int-quantized` is
    M.weight int8 [O, I]    M.weight_scale as above    M.weight_zero_point int8 [O, G], only asymmetric
    M.input_scale weight's dtype [1]    only where activations are static: max |x| / 127.5, rounded once; the dtype's
                                        epsilon where that is 0 (`quantization/utils/helpers.py`, `calculate_qparams`)
`float-quantized` is
    M.weight float8_e4m3fn [O, I]    M.weight_scale weight's dtype [O, 1], [1], or [ceil(O/128), ceil(I/128)]
with activations per token or, beside blocks, by groups of 128 columns of a token: `W8A8Fp8` of vLLM takes any dynamic
ones beside these weights (`_is_fp8_w8a8`), none are `W8A16Fp8`.
W4A8 is what W4A16 is, with one more key in the config. compressed-tensors itself would store it as `int-quantized`, a
byte a code (`compressors/format.py`): that is read. The packed one is half as large, and the one that vLLM reads on
GPUs (`_is_wNaM_int`); it takes the other on Arm CPUs and XPUs.
Sources: compressed-tensors 0.20 `compressors/pack_quantized/base.py` and `helpers.py`,
`compressors/naive_quantized/base.py`, `quantization/quant_config.py`, `quantization/lifecycle/initialize.py` (which
creates `input_scale` in the weight's dtype; vLLM copies it into float32). The config uses
only keys that versions 0.17 to 0.20 know.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantconvert.errors import UnsupportedError
from quantconvert.layouts.base import Layout, ModuleReader, Packed, Packing, Selection, Stored, TensorSpec
from quantconvert.layouts.config_groups import (
    FLOAT,
    INT,
    MXFP4,
    MXFP8,
    NVFP4,
    PACKED,
    Group,
    format_of,
    inputs_of,
    is_plain,
    weights_of,
)
from quantconvert.layouts.floats import (
    DIVISOR,
    float_decode,
    float_encode,
    float_outputs,
    float_rank_problems,
    float_row_multiple,
)
from quantconvert.patterns import check_foreign, compile_pattern, cover
from quantconvert.schemes import Scheme
from quantconvert.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.quantized import Quantized


class CompressedTensors(Layout):
    name = "compressed-tensors"
    summary = "int4 and int8, packed along the input dimension; W8A8 as plain int8; float8 and float4"
    kinds = ("int", "float")
    constant = frozenset({"input_scale"})
    suffixes = constant | {
        "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", DIVISOR,
    }  # fmt: skip
    optional = frozenset({"weight_shape"})
    symmetric_by_default = True
    weight_only = False

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        return []

    def rank_problems(self, scheme: Scheme, shape: tuple[int, int], module: str) -> list[str]:
        pack = scheme.number.per_word
        if scheme.type == "float":
            return float_rank_problems(scheme, shape)
        found = []
        if not is_plain(scheme) and shape[1] % pack:
            found.append(f"{pack} codes share a word: expected in_features % {pack} == 0, got {shape[1]}")
        if not scheme.symmetric and scheme.strategy != "tensor" and shape[0] % pack:
            found.append(f"{pack} zero points share a word: expected out_features % {pack} == 0, got {shape[0]}")
        return found

    def mix_problem(self, schemes: Sequence[Scheme]) -> str | None:
        return None

    def row_multiple(self, scheme: Scheme) -> int:
        if scheme.type == "float":
            return float_row_multiple(scheme)
        return 1 if scheme.symmetric or is_plain(scheme) else scheme.number.per_word

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        if scheme.type == "float":
            return float_outputs(shape, weight_dtype, scheme)
        rows, columns = shape
        pack = scheme.number.per_word
        groups = scheme.num_groups(columns)
        whole = scheme.strategy == "tensor"
        per_group = ((1,), 0) if whole else ((rows, groups), 1)
        if is_plain(scheme):
            return _plain_outputs(shape, weight_dtype, scheme)
        specs = [
            TensorSpec("weight_packed", "I32", (rows, -(-columns // pack))),
            TensorSpec("weight_scale", weight_dtype, *per_group),
            TensorSpec("weight_shape", "I64", (2,), 0),
        ]
        if not scheme.symmetric and whole:
            specs.append(TensorSpec("weight_zero_point", "I8", (1,), 0))
        elif not scheme.symmetric:
            specs.append(TensorSpec("weight_zero_point", "I32", (-(-rows // pack), groups), pack))
        return tuple(specs)

    def stored_outputs(self, stored: Stored) -> tuple[TensorSpec, ...]:
        if "weight" in stored.refs and stored.scheme.type == "int":
            return _plain_outputs(stored.shape, stored.scale.dtype, stored.scheme)
        return super().stored_outputs(stored)

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if scheme.type == "float":
            return float_encode(quantized, scheme)
        import torch

        from quantconvert.layouts.packing import pack_columns, pack_rows

        whole = scheme.strategy == "tensor"
        scale = quantized.scale.reshape(1) if whole else quantized.scale

        def signed(values: Tensor) -> Tensor:
            return (values.to(torch.int16) - scheme.number.midpoint).to(torch.int8)

        if is_plain(scheme):
            plain = {"weight": signed(quantized.codes), "weight_scale": scale}
            offset = quantized.offset
            return plain if offset is None else plain | {"weight_zero_point": signed(offset).view(scale.shape)}
        blocks = {
            "weight_packed": pack_columns(quantized.codes, scheme.num_bits),
            "weight_scale": scale,
        } | self.shaped_tensors(scheme, shape)
        if not scheme.symmetric:
            zeros = quantized.zero_points()
            blocks["weight_zero_point"] = signed(zeros).reshape(1) if whole else pack_rows(zeros, scheme.num_bits)
        return blocks

    def packing(self, scheme: Scheme) -> Packing | None:
        if scheme.type == "float":
            return None
        half, zeros = scheme.number.midpoint, "weight_zero_point"
        signed = None if scheme.symmetric else Packed(zeros, "bytes", shift=-half)
        if is_plain(scheme):
            return Packing(Packed("weight", "bytes", shift=-half), signed)
        words = None if scheme.symmetric else Packed(zeros, "rows")
        return Packing(Packed("weight_packed", "columns"), signed if scheme.strategy == "tensor" else words)

    def shaped(self, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, array[int]]:
        return {} if is_plain(scheme) or scheme.type == "float" else {"weight_shape": array("q", shape)}

    def constants(self, scheme: Scheme, weight_dtype: str, input_max: float | None) -> dict[str, Tensor]:
        if not scheme.static:
            return {}
        import torch

        from quantconvert.buffers import torch_dtype

        assert input_max is not None
        dtype = torch_dtype(weight_dtype)
        scale = (torch.tensor([input_max]) / (scheme.number.top / 2)).to(dtype)
        return {"input_scale": torch.where(scale == 0, torch.finfo(dtype).eps, scale)}

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        for key in ("transform_config", "sparsity_config"):
            if block.get(key):
                raise UnsupportedError(f"quantization_config has a {key}: codes alone do not give its weights back")
        _check_formats(block)
        groups = [Group.read(group) for group in (block.get("config_groups") or {}).values()]

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if "weight_packed" not in refs and (refs["weight"].dtype not in _BYTES or "weight_scale" not in refs):
                return None
            group = next((g for g in groups if g.targets(module)), None)
            group = group or next((g for g in groups if g.targets("Linear")), None)
            packed = "weight_packed" in refs
            if refs["weight_packed" if packed else "weight"].dtype in _FLOAT_BYTES:
                return _float_module(module, refs, group)
            if group is None or group.scheme is None or group.scheme.type != "int":
                raise UnsupportedError(f"no config group of 4 or 8 integer bits targets `{module}`, which is quantized")
            known = refs.get("input_scale")
            static = not packed and group.is_static and (known is None or known.shape == (1,))
            if not static:  # a scale of what is not read here
                refs = {suffix: ref for suffix, ref in refs.items() if suffix != "input_scale"}
            why = group.only_dequantize(packed, refs)
            acting = not packed or (group.activations is not None and why is None)
            kind = group.input_type if acting and packed else None
            scheme = replace(group.scheme, activations=acting, static=static, input_type=kind)
            if packed:
                rows, words = refs["weight_packed"].shape
                columns = words * scheme.number.per_word
                if "weight_shape" in refs:
                    rows, columns = struct.unpack("<2q", read(refs["weight_shape"]))
            else:
                rows, columns = refs["weight"].shape
            return Stored(module, scheme, (rows, columns), refs, only_dequantize=why)

        return stored

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        import torch

        from quantconvert.layouts.packing import unpack_columns, unpack_rows
        from quantconvert.quantized import Quantized

        scheme, scale = stored.scheme, blocks["weight_scale"]
        if scheme.type == "float":
            return float_decode(blocks, scheme, stored.shape[1])
        scale = scale.reshape(1, 1) if scheme.strategy == "tensor" else scale
        half = scheme.number.midpoint
        zero_point = None if scheme.symmetric else blocks["weight_zero_point"]
        if zero_point is not None and zero_point.dtype == torch.int8:
            zero_point = (zero_point.to(torch.int16) + half).to(torch.uint8).view(scale.shape)
        elif zero_point is not None:
            zero_point = unpack_rows(zero_point, scheme.num_bits, rows)
        if "weight" in blocks:
            codes = (blocks["weight"].to(torch.int16) + half).to(torch.uint8)
        else:
            codes = unpack_columns(blocks["weight_packed"], scheme.num_bits, stored.shape[1])
        return Quantized(codes, scale, zero_point, scheme.number)

    def config(self, selection: Selection) -> dict[str, Any]:
        quantized = selection.quantized
        head = [name for name in quantized if name.endswith("lm_head")]
        groups = {}
        for i, (scheme, modules) in enumerate(selection.schemes.items()):
            others = [name for s, names in selection.schemes.items() if s != scheme for name in names]
            if others:
                targets = cover(modules, [*others, *selection.kept], selection.fused_pairs)
            else:  # vLLM's output head is no `Linear`
                targets = ["Linear", *cover(head, [], ())]
            groups[f"group_{i}"] = {
                "targets": targets,
                "weights": weights_of(scheme),
                "input_activations": inputs_of(scheme) if scheme.activations else None,
                "output_activations": None,
                "format": format_of(scheme),
            }
        ignore = cover([n for n in selection.kept if n != "lm_head"], quantized, selection.fused_pairs)
        # engines build tied heads as linear layers, though the checkpoint holds no weight of theirs
        tied = [name for name in selection.tied if name not in (*selection.kept, *quantized)]
        formats = {str(group["format"]) for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*([] if head else ["lm_head"]), *tied, *ignore, *selection.more_kept],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        groups = [Group.read(group) for group in (block.get("config_groups") or {}).values()]
        ignored = [compile_pattern(check_foreign(str(pattern))) for pattern in block.get("ignore") or ()]

        def left(module: str) -> bool:
            if any(matches(module) for matches in ignored):
                return True
            return not any(group.targets(module) or group.targets("Linear") for group in groups)

        return left


def _plain_outputs(shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
    rows, columns = shape
    per_group = ((1,), 0) if scheme.strategy == "tensor" else ((rows, scheme.num_groups(columns)), 1)
    plain = (TensorSpec("weight", "I8", (rows, columns)), TensorSpec("weight_scale", weight_dtype, *per_group))
    inputs = (TensorSpec("input_scale", weight_dtype, (1,), 0),) if scheme.static else ()
    zeros = () if scheme.symmetric else (TensorSpec("weight_zero_point", "I8", *per_group),)
    return (*plain, *zeros, *inputs)


# Dtypes of codes that are not packed, and those of floats: two float4 share a byte.
_BYTES = ("I8", "F8_E4M3")
_FLOAT_BYTES = ("F8_E4M3", "U8")
# compressed-tensors `CompressionFormat`: those whose modules are read here, or as float8, or that hold plain weights.
_READ_FORMATS = {PACKED, INT, FLOAT, NVFP4, MXFP4, MXFP8, "naive-quantized", "dense", "mixed-precision"}


def _check_formats(block: Mapping[str, Any]) -> None:
    """Refuse a compression that is not read by its name, once, rather than each of its modules."""
    groups = [group for group in (block.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    named = [str(part["format"]) for part in (block, *groups) if part.get("format")]
    unread = sorted({name for name in named if name not in _READ_FORMATS})
    if unread:
        raise UnsupportedError(
            f"the source is quantized as {', '.join(map(quoted, unread))} (compressed-tensors), which is not read",
            hint="give the original checkpoint in bfloat16, float16 or float32",
        )


def _float_module(module: str, refs: Mapping[str, TensorRef], group: Group | None) -> Stored | None:
    """A module of floats, if it is of a kind that is written here; others are read as sources alone."""
    if group is None or group.scheme is None or group.scheme.type != "float" or "input_scale" in refs:
        return None
    scheme, packed = group.scheme, "weight_packed" in refs
    rows, columns = refs["weight_packed" if packed else "weight"].shape
    acting = group.activations is not None and not scheme.activations
    why = "quantizes activations in a way that no layout of ours says" if acting else None
    return Stored(module, scheme, (rows, 2 * columns if packed else columns), refs, only_dequantize=why)
