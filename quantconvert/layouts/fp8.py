"""fp8: float8 in blocks, as DeepSeek and Qwen publish it, and as transformers reads it by itself.

For a module `M` with weight [O, I] in blocks of a x b (128 x 128):
    M.weight            float8_e4m3fn [O, I]
    M.weight_scale_inv  float32 [ceil(O/a), ceil(I/b)], multiplied in spite of its name
Inputs are rounded to float8 while the model runs, by groups of b columns of a token.

Sources: DeepSeek-V3 `inference/fp8_cast_bf16.py`; transformers `quantizers/quantizer_finegrained_fp8.py` and
`integrations/finegrained_fp8.py`; vLLM `layers/quantization/fp8.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantconvert.layouts.base import Layout, ModuleReader, Selection, Stored, TensorSpec
from quantconvert.layouts.floats import (
    float_decode,
    float_encode,
    float_outputs,
    float_rank_problems,
    float_row_multiple,
)
from quantconvert.schemes import BLOCK, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.quantized import Quantized

SCALE = "weight_scale_inv"
# Scales that are whole exponents (U8, F8_E8M0) are read as a source alone.
_SCALES = ("F32", "BF16", "F16")


class Fp8Blocks(Layout):
    name = "fp8"
    summary = "float8 in blocks of 128 x 128, as DeepSeek and Qwen publish it"
    suffixes = frozenset({"weight", SCALE})
    scale_suffix = SCALE
    symmetric_by_default = True
    kinds = ("float",)
    weight_only = False
    default_scheme = "FP8_BLOCK"

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        return [] if scheme.block == BLOCK and scheme.activations else [f"fp8 holds FP8_BLOCK alone, no {scheme.label}"]

    def rank_problems(self, scheme: Scheme, shape: tuple[int, int], module: str) -> list[str]:
        return float_rank_problems(scheme, shape)

    def row_multiple(self, scheme: Scheme) -> int:
        return float_row_multiple(scheme)

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F32"

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        return float_outputs(shape, self.scale_dtype(weight_dtype), scheme, SCALE)

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return float_encode(quantized, scheme, SCALE)

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        return float_decode(blocks, stored.scheme, stored.shape[1], SCALE)

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        size = block.get("weight_block_size")
        known = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if size is None or not known or not refs.keys() >= {"weight", SCALE} or refs[SCALE].dtype not in _SCALES:
                return None
            if len(refs["weight"].shape) != 2 or refs["weight"].dtype != "F8_E4M3":
                return None
            rows, columns = refs["weight"].shape
            scheme = Scheme(8, True, "block", None, True, "float", block=(size[0], size[1]))
            return Stored(module, scheme, (rows, columns), refs)

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        kept = sorted({*({"lm_head"} - set(selection.quantized)), *selection.kept_and_fused})
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": kept + [pattern.removeprefix("re:") for pattern in selection.more_kept],
        }

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        names = {str(name) for name in block.get("modules_to_not_convert") or block.get("ignored_layers") or ()}
        return lambda module: any(
            module == name or module.startswith(f"{name}.") or module.endswith(f".{name}") for name in names
        )
