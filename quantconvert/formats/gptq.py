"""GPTQ: int4 and int8, codes packed along the input dimension, zero points along the output.

For a module `M` with weight [O, I], b bits, p = 32 / b, G groups:
    M.qweight int32 [I/p, O]    word [r, c] holds inputs r*p .. r*p+p-1 of output c, the first in the lowest bits
    M.qzeros  int32 [G, O/p]    zero points of neighbouring outputs, the first in the lowest bits
    M.scales  float16 [G, O]
    M.g_idx   int32 [I]         i // group_size: trivial, as `desc_act` is false
`w = scales * (u - zero)`, u unsigned. Symmetric weights (zero 2^(b-1)) are written as checkpoint_format `gptq` (v1),
which stores zero - 1; asymmetric ones as `gptq_v2`, which stores the zero itself: a v1 zero of 0 would wrap into its
neighbour. Sources: GPTQModel 7.7 `gptqmodel/nn_modules/qlinear/__init__.py` (`pack_block`) and `utils/model.py`; vLLM
`quantization/utils/gptq_utils.py` for `dynamic`; optimum `gptq/quantizer.py` for `modules_in_block_to_quantize`;
../shared/formats.md section 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import UnsupportedError
from quantconvert.formats.base import Format, Selection, Stored, StoredReader, TensorSpec, grouped_scheme
from quantconvert.patterns import cover
from quantconvert.schemes import Scheme
from quantconvert.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.methods.base import Quantized


class Gptq(Format):
    name = "gptq"
    summary = "int4 and int8, packed along the input dimension (v1 symmetric, v2 asymmetric)"
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    symmetric_by_default = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        found = []
        pack = 32 // scheme.num_bits
        if scheme.activations:
            found.append("gptq is weight-only")
        if scheme.strategy == "tensor":
            found.append("gptq has no per-tensor scales")
        for what, size in (("out_features", shape[0]), ("in_features", shape[1])):
            if size % pack:
                found.append(f"gptq packs {pack} values in a word: expected {what} % {pack} == 0, got {size}")
        return found

    def mix_problem(self, schemes: Sequence[Scheme]) -> str | None:
        if len({scheme.symmetric for scheme in schemes}) > 1:
            return "gptq stores all zero points the same way, symmetric or not"
        return None

    def caveats(self, scheme: Scheme, has_experts: bool) -> list[str]:
        found = []
        if has_experts:
            found.append(
                "transformers 5 loads GPTQ experts as random numbers without an error, and GPTQModel 7 does not know "
                "Mixtral's names for them: use vLLM"
            )
        if not scheme.symmetric:
            found.append("vLLM and SGLang reject asymmetric GPTQ; transformers and GPTQModel load it (gptq_v2)")
        if scheme.strategy == "channel":
            found.append("transformers on a CPU has no kernel for GPTQ per channel")
        elif scheme.group_size not in (32, 64, 128):
            found.append(f"vLLM and SGLang read GPTQ group sizes 32, 64, 128 and -1, not {scheme.group_size}")
        if scheme.num_bits == 8:
            found.append("vLLM on a CPU has no int8 weight-only kernel")
        return found

    def row_multiple(self, scheme: Scheme) -> int:
        return 32 // scheme.num_bits

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F16"

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        pack, groups = 32 // scheme.num_bits, scheme.num_groups(columns)
        return (
            TensorSpec("qweight", "I32", (columns // pack, rows), 1, transposed=True),
            TensorSpec("qzeros", "I32", (groups, rows // pack), pack, transposed=True),
            TensorSpec("scales", "F16", (groups, rows), 1, transposed=True),
            TensorSpec("g_idx", "I32", (columns,), 0),
        )

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        import torch

        from quantconvert.kernels.packing import pack_columns, pack_rows

        stored = quantized.zero_points(scheme) - (1 if scheme.symmetric else 0)
        return {
            "qweight": pack_columns(quantized.codes, scheme.num_bits),
            "qzeros": pack_rows(stored, scheme.num_bits),
            "scales": quantized.scale,
            "g_idx": torch.arange(shape[1], dtype=torch.int32) // (scheme.group_size or shape[1]),
        }

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        from quantconvert.kernels.packing import unpack_columns, unpack_rows
        from quantconvert.methods.base import Quantized

        bits = stored.scheme.num_bits
        codes = unpack_columns(blocks["qweight"], bits, stored.shape[1])
        zeros = unpack_rows(blocks["qzeros"], bits, rows) + stored.zero_offset
        return Quantized.of(codes, blocks["scales"], zeros & (2**bits - 1), stored.scheme)

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> StoredReader:
        """Bits follow from shapes (qweight has I*b/32 rows, g_idx has I), so `dynamic` overrides need no reading."""
        version = block.get("checkpoint_format", block.get("format", "gptq"))
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedError(f"GPTQ of checkpoint_format `{version}`: expected `gptq` or `gptq_v2`")
        offset = 1 if version == "gptq" else 0

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if not {"qweight", "qzeros", "scales"} <= set(refs):
                return None
            words, rows = refs["qweight"].shape
            columns = refs["g_idx"].shape[0] if "g_idx" in refs else words * 32 // int(block.get("bits") or 4)
            bits = words * 32 // columns
            if bits not in (4, 8) or columns * bits != words * 32:
                raise UnsupportedError(f"`{module}` is GPTQ with {bits} bits: expected 4 or 8")
            groups, symmetric = refs["scales"].shape[0], bool(block.get("sym", True))
            scheme = grouped_scheme(bits, symmetric, columns, groups, block.get("group_size"))
            return Stored(module, scheme, (rows, columns), refs, offset, bool(block.get("desc_act")))

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        """`dynamic` serves GPTQModel, vLLM and SGLang (fused names included); the list of lists serves transformers."""
        (base, *others) = sorted(selection.schemes, key=lambda s: -len(selection.schemes[s]))
        head = any(name.endswith("lm_head") for name in selection.quantized)
        dynamic: dict[str, dict[str, Any]] = {}
        skipped = [name for name in selection.kept if name != "lm_head"]
        if not head:
            dynamic[r"-:.*lm_head$"] = {}
        for pattern in cover(skipped, selection.quantized, selection.fused_pairs):
            dynamic["-:" + pattern.removeprefix("re:")] = {}
        for scheme in others:
            rest = [name for s, names in selection.schemes.items() if s != scheme for name in names]
            for pattern in cover(selection.schemes[scheme], [*rest, *selection.kept], selection.fused_pairs):
                override = {"bits": scheme.num_bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}
                dynamic["+:" + pattern.removeprefix("re:")] = override
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if base.symmetric else "gptq_v2",
            "bits": base.num_bits,
            "group_size": base.group_size or -1,
            "sym": base.symmetric,
            "desc_act": False,
            "damp_percent": 0.01,
            "true_sequential": True,
            "lm_head": head,
            "pack_dtype": "int32",
            "dynamic": dynamic,
            "modules_in_block_to_quantize": [[name] for name in _names_in_block(selection.quantized)],
            "meta": {"quantizer": [f"quantconvert:{__version__}"]},
        }

    def load_hint(self, out: str, scheme: Scheme) -> list[str]:
        lines = [f'AutoModelForCausalLM.from_pretrained("{out}")  # transformers + optimum + gptqmodel']
        return [f"vllm serve {out}", *lines] if scheme.symmetric else lines


def _names_in_block(modules: Sequence[str]) -> list[str]:
    """The part of each name after the layer number, experts left out (transformers 5 has no modules for them)."""
    tails = (re.search(r"\.\d+\.(?!.*\.experts\.\d+\.)(.+)$", name) for name in modules)
    return list(dict.fromkeys(tail[1] for tail in tails if tail))
