"""AWQ, the GEMM layout: int4 packed along the output dimension.

For a module `M` with weight [O, I], group size S, G = I / S:
    M.qweight int32 [I, O/8]    M.qzeros int32 [G, O/8]    M.scales float16 [G, O]
Nibble k (least significant first) of a word holds output column `ORDER[k]` of its eight; zero points are unsigned
0..15 without offset; `w = (u - z) * s`. Sources: GPTQModel `gptqmodel/quantization/awq/utils/packing_utils.py`, vLLM
`vllm/model_executor/layers/quantization/auto_awq.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantconvert.errors import CheckpointError, UnsupportedError
from quantconvert.layouts.base import (
    Layout,
    ModuleReader,
    Packed,
    Packing,
    Selection,
    Stored,
    TensorSpec,
    grouped_scheme,
    skipped_by,
    width_by,
)
from quantconvert.number import INT4
from quantconvert.patterns import cover
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.quantized import Quantized

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Layout):
    name = "awq"
    summary = "int4 packed along the output dimension (GEMM)"
    suffixes = frozenset({"qweight", "qzeros", "scales"})
    scale_suffix = "scales"
    symmetric_by_default = False
    zeros_tell_symmetry = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        found = []
        if scheme.activations:
            found.append("awq is weight-only")
        if module.endswith("lm_head"):
            found.append("AWQ engines read lm_head in high precision only")
        if scheme.num_bits != 4:
            found.append(f"awq holds 4 bits only, got {scheme.num_bits}")
        if scheme.strategy == "tensor":
            found.append("awq has no per-tensor scales")
        if shape[0] % 8:
            found.append(f"awq packs 8 output features in a word: expected out_features % 8 == 0, got {shape[0]}")
        return found

    def row_multiple(self, scheme: Scheme) -> int:
        return 8

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F16"

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        groups = scheme.num_groups(columns)
        return (
            TensorSpec("qweight", "I32", (columns, rows // 8), 8, transposed=True),
            TensorSpec("qzeros", "I32", (groups, rows // 8), 8, transposed=True),
            TensorSpec("scales", self.scale_dtype(weight_dtype), (groups, rows), 1, transposed=True),
        )

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        from quantconvert.layouts.packing import pack_rows_int4

        return {
            "qweight": pack_rows_int4(quantized.codes, ORDER),
            "qzeros": pack_rows_int4(quantized.zero_points(), ORDER),
            "scales": quantized.scale,
        }

    def packing(self, scheme: Scheme) -> Packing:
        return Packing(Packed("qweight", "rows", ORDER), Packed("qzeros", "rows", ORDER))

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        from quantconvert.layouts.packing import unpack_rows_int4
        from quantconvert.quantized import Quantized

        codes, zeros = (unpack_rows_int4(blocks[name], ORDER)[:rows] for name in ("qweight", "qzeros"))
        return Quantized(codes, blocks["scales"], None if stored.scheme.symmetric else zeros, stored.scheme.number)

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        """AWQ always stores zero points; weights whose zeros are all 8 are symmetric."""
        if block.get("version", block.get("format", "gemm")) not in ("gemm", "GEMM"):
            raise UnsupportedError(f"AWQ of version `{block.get('version')}`: expected `gemm`")

        size = block.get("group_size", block.get("q_group_size"))

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if not {"qweight", "qzeros", "scales"} <= set(refs):
                raise CheckpointError(f"`{module}` is AWQ with {', '.join(sorted(refs))} only")
            columns, words = refs["qweight"].shape
            symmetric = set(read(refs["qzeros"])) <= {INT4.midpoint * 0x11}
            scheme = grouped_scheme(4, symmetric, columns, refs["scales"].shape[0], size)
            return Stored(module, scheme, (words * 8, columns), refs)

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        """`modules_to_not_convert` is matched as a substring, so a kept name inside a quantized one cannot be said.

        Then (a router `mlp.gate` beside `mlp.gate_proj`) the key is left out: vLLM reads which modules are quantized
        from the tensors' dtypes. GPTQModel reads neither, but `dynamic`.
        """
        (scheme,) = selection.schemes
        config: dict[str, Any] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
        }
        kept = sorted({"lm_head", *selection.kept_and_fused, *_towers(selection)})
        kept += [pattern.removeprefix("re:") for pattern in selection.more_kept]
        text = "\n".join(selection.quantized)
        if not any(name in text for name in kept):
            config["modules_to_not_convert"] = kept
        skipped = [name for name in selection.kept if name != "lm_head"]
        if skipped:
            patterns = cover(skipped, selection.quantized, selection.fused_pairs)
            config["dynamic"] = {"-:" + pattern.removeprefix("re:"): {} for pattern in patterns}
        return config

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        names = [str(name) for name in block.get("modules_to_not_convert") or ()]
        skipped = skipped_by(block)
        return lambda module: any(name in module for name in names) or skipped(module)

    def width(self, block: Mapping[str, Any], module: str) -> tuple[int, int] | None:
        return width_by(block, module)


def _towers(selection: Selection) -> set[str]:
    """`.*vision_tower.*` for every tower that is kept as a whole.

    transformers gives towers other names than the Hub (`model.vision_tower.encoder` for
    `vision_tower.vision_model.encoder`), and compares from the start of a name, as regular expressions, or its end
    (`quantizers/quantizers_utils.py`, `should_convert_module`).
    """
    from quantconvert.families.common import TOWERS

    found = (re.search(pattern, name) for name in selection.kept for pattern, reason in TOWERS if reason != "mtp")
    names = {match[0].strip(".") for match in found if match}
    return {f".*{name}.*" for name in names if not any(name in quantized for quantized in selection.quantized)}
