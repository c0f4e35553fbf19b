"""compressed-tensors `pack-quantized`: weight-only int4 and int8, packed along the input dimension.

For a module `M` with weight [O, I], b bits, G groups:
    M.weight_packed int32 [O, ceil(I*b/32)]     codes stored unsigned (q + 2^(b-1)), first value in the lowest bits
    M.weight_scale  weight's dtype [O, G]       [O, 1] per channel, [1] per tensor
    M.weight_shape  int64 [2] = [O, I]          always: transformers fails without it
    M.weight_zero_point int32 [ceil(O*b/32), G] only asymmetric, packed along the output; int8 [1] per tensor
Sources: compressed-tensors 0.20 `compressors/pack_quantized/base.py` and `helpers.py`, `quantization/quant_config.py`;
../shared/formats.md section 1. The config uses only keys that versions 0.17 to 0.20 know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantconvert.formats.base import Format, Selection, TensorSpec
from quantconvert.job import Scheme
from quantconvert.patterns import cover

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.methods.base import Quantized

PACKED = "pack-quantized"


class CompressedTensors(Format):
    name = "compressed-tensors"
    summary = "int4 and int8 weight-only, packed along the input dimension (pack-quantized)"
    symmetric_by_default = True
    mixed_schemes = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        return []

    def caveats(self, scheme: Scheme, has_experts: bool) -> list[str]:
        found = []
        if scheme.strategy == "tensor":
            found.append("vLLM rejects weight-only per-tensor scales (it requires group or channel)")
        if scheme.strategy == "group" and scheme.group_size not in (32, 64, 128):
            found.append(f"vLLM's Marlin kernel reads group sizes 32, 64, 128 and -1, not {scheme.group_size}")
        if not scheme.symmetric:
            found.append("transformers loads asymmetric pack-quantized weights only with dequantize=True")
            if scheme.num_bits == 8:
                found.append("vLLM runs asymmetric int8 weights on Hopper only, SGLang not at all")
            if has_experts:
                found.append("transformers fails on asymmetric experts and SGLang 0.5 computes them wrongly")
        if scheme.num_bits == 8:
            found.append("vLLM on a CPU has no int8 weight-only kernel")
        return found

    def row_multiple(self, scheme: Scheme) -> int:
        return 1 if scheme.symmetric else 32 // scheme.num_bits

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        pack = 32 // scheme.num_bits
        groups = scheme.num_groups(columns)
        whole = scheme.strategy == "tensor"
        specs = [
            TensorSpec("weight_packed", "I32", (rows, -(-columns // pack))),
            TensorSpec("weight_scale", weight_dtype, (1,) if whole else (rows, groups), 0 if whole else 1),
            TensorSpec("weight_shape", "I64", (2,), 0),
        ]
        if not scheme.symmetric and whole:
            specs.append(TensorSpec("weight_zero_point", "I8", (1,), 0))
        elif not scheme.symmetric:
            specs.append(TensorSpec("weight_zero_point", "I32", (-(-rows // pack), groups), pack))
        return tuple(specs)

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        import torch

        from quantconvert.kernels.packing import pack_columns, pack_rows

        whole = scheme.strategy == "tensor"
        blocks = {
            "weight_packed": pack_columns(quantized.codes, scheme.num_bits),
            "weight_scale": quantized.scale.reshape(1) if whole else quantized.scale,
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            zero_point = quantized.zero_points(scheme)
            half = 1 << (scheme.num_bits - 1)
            signed = (zero_point.to(torch.int16) - half).to(torch.int8).reshape(1) if whole else None
            blocks["weight_zero_point"] = pack_rows(zero_point, scheme.num_bits) if signed is None else signed
        return blocks

    def config(self, selection: Selection) -> dict[str, Any]:
        several = len(selection.schemes) > 1
        groups = {}
        for i, (scheme, modules) in enumerate(selection.schemes.items()):
            others = [name for s, names in selection.schemes.items() if s != scheme for name in names]
            targets = cover(modules, [*others, *selection.kept], selection.fused_pairs) if several else ["Linear"]
            groups[f"group_{i}"] = {
                "targets": targets,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": PACKED,
            }
        ignore = cover([n for n in selection.kept if n != "lm_head"], selection.quantized, selection.fused_pairs)
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head", *ignore],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def load_hint(self, out: str, scheme: Scheme) -> list[str]:
        model = f'AutoModelForCausalLM.from_pretrained("{out}"'
        if not scheme.symmetric:
            model += ", quantization_config=CompressedTensorsConfig(dequantize=True)"
        return [f"vllm serve {out}", model + ")  # transformers + compressed-tensors"]


def _weights(scheme: Scheme) -> dict[str, Any]:
    """compressed-tensors `QuantizationArgs`; unknown keys are forbidden there."""
    return {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
