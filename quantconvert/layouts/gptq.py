"""GPTQ: int4 and int8, codes packed along the input dimension, zero points along the output.

For a module `M` with weight [O, I], b bits, p = 32 / b, G groups:
    M.qweight int32 [I/p, O]    word [r, c] holds inputs r*p .. r*p+p-1 of output c, the first in the lowest bits
    M.qzeros  int32 [G, O/p]    zero points of neighbouring outputs, the first in the lowest bits
    M.scales  float16 [G, O]
    M.g_idx   int32 [I]         i // group_size: trivial, as `desc_act` is false
`w = scales * (u - zero)`, u unsigned. Symmetric weights (zero 2^(b-1)) are written as checkpoint_format `gptq` (v1),
which stores zero - 1; asymmetric ones as `gptq_v2`, which stores the zero itself: a v1 zero of 0 would wrap into its
neighbour. Sources: GPTQModel 7.7 `gptqmodel/nn_modules/qlinear/__init__.py` (`pack_block`) and `utils/model.py`; vLLM
`quantization/utils/gptq_utils.py` for `dynamic`; optimum `gptq/quantizer.py` for `modules_in_block_to_quantize`.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
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
from quantconvert.number import INT4, INT8
from quantconvert.patterns import cover
from quantconvert.schemes import Scheme
from quantconvert.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.quantized import Quantized


# Every byte of packed zero points of symmetric weights, by bits and by what a stored zero lacks (v1: one).
_ZERO_BYTES = {
    (number.num_bits, lacks): (number.midpoint - lacks) * (0x11 if number.num_bits == 4 else 1)
    for number in (INT4, INT8)
    for lacks in (0, 1)
}


class Gptq(Layout):
    name = "gptq"
    summary = "int4 and int8, packed along the input dimension (v1 symmetric, v2 asymmetric)"
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    scale_suffix = "scales"
    optional = frozenset({"g_idx"})
    symmetric_by_default = True
    zeros_tell_symmetry = True

    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        found = []
        pack = scheme.number.per_word
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

    def row_multiple(self, scheme: Scheme) -> int:
        return scheme.number.per_word

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F16"

    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        pack, groups = scheme.number.per_word, scheme.num_groups(columns)
        return (
            TensorSpec("qweight", "I32", (columns // pack, rows), 1, transposed=True),
            TensorSpec("qzeros", "I32", (groups, rows // pack), pack, transposed=True),
            TensorSpec("scales", "F16", (groups, rows), 1, transposed=True),
            TensorSpec("g_idx", "I32", (columns,), 0),
        )

    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        from quantconvert.layouts.packing import pack_columns, pack_rows

        stored = quantized.zero_points() - (1 if scheme.symmetric else 0)
        return {
            "qweight": pack_columns(quantized.codes, scheme.num_bits),
            "qzeros": pack_rows(stored, scheme.num_bits),
            "scales": quantized.scale,
        } | self.shaped_tensors(scheme, shape)

    def packing(self, scheme: Scheme) -> Packing:
        return Packing(Packed("qweight", "columns"), Packed("qzeros", "rows", shift=-1 if scheme.symmetric else 0))

    def shaped(self, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, array[int]]:
        size = scheme.group_size or shape[1]
        return {"g_idx": array("i", (group for group in range(shape[1] // size) for _ in range(size)))}

    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        from quantconvert.layouts.packing import unpack_columns, unpack_rows
        from quantconvert.quantized import Quantized

        bits = stored.scheme.num_bits
        codes = unpack_columns(blocks["qweight"], bits, stored.shape[1])
        # v1: GPTQModel subtracts one from every value of a word at once, borrows included; so must adding it back
        words = blocks["qzeros"] + stored.zero_offset * (0x11111111 if bits == 4 else 0x01010101)
        zeros = None if stored.scheme.symmetric else unpack_rows(words, bits, rows)
        order = blocks["g_idx"].long() if stored.reordered else None
        return Quantized(codes, blocks["scales"], zeros, stored.scheme.number, order=order)

    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        """Bits, symmetry and order follow from the tensors, whatever the config and its `dynamic` rules say."""
        version = block.get("checkpoint_format", block.get("format", "gptq"))
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedError(f"GPTQ of checkpoint_format `{version}`: expected `gptq` or `gptq_v2`")
        offset = 1 if version == "gptq" else 0

        def stored(module: str, refs: Mapping[str, TensorRef]) -> Stored | None:
            if not {"qweight", "qzeros", "scales"} <= set(refs):
                raise CheckpointError(f"`{module}` is GPTQ with {', '.join(sorted(refs))} only")
            words, rows = refs["qweight"].shape
            columns = refs["g_idx"].shape[0] if "g_idx" in refs else words * 32 // int(block.get("bits") or 4)
            bits = words * 32 // columns
            if bits not in (4, 8) or columns * bits != words * 32:
                raise UnsupportedError(f"`{module}` is GPTQ with {bits} bits: expected 4 or 8")
            groups = refs["scales"].shape[0]
            symmetric = set(read(refs["qzeros"])) <= {_ZERO_BYTES[bits, offset]}
            order = struct.unpack(f"<{columns}i", read(refs["g_idx"])) if "g_idx" in refs else None
            if (order is None and block.get("desc_act")) or (order and not all(0 <= g < groups for g in order)):
                raise CheckpointError(f"`{module}` has no `g_idx` that names its {groups} groups")
            size = columns // groups
            if order and any(g != i // size for i, g in enumerate(order)):
                scheme = Scheme(bits, symmetric, "group", size)
                why = "orders columns by g_idx (desc_act)"
                return Stored(module, scheme, (rows, columns), refs, offset, True, why)
            scheme = grouped_scheme(bits, symmetric, columns, groups, block.get("group_size"))
            return Stored(module, scheme, (rows, columns), refs, offset)

        return stored

    def config(self, selection: Selection) -> dict[str, Any]:
        """`dynamic` serves GPTQModel, vLLM and SGLang (fused names included); the list of lists serves transformers."""
        (base, *others) = sorted(selection.schemes, key=lambda s: -len(selection.schemes[s]))
        head = any(name.endswith("lm_head") for name in selection.quantized)
        dynamic: dict[str, dict[str, Any]] = {}
        skipped = [name for name in selection.kept if name != "lm_head"]
        if not head:
            dynamic[r"-:.*lm_head$"] = {}
        for pattern in _dynamic(skipped, selection.quantized, selection):
            dynamic["-:" + pattern] = {}
        for scheme in others:
            rest = [name for s, names in selection.schemes.items() if s != scheme for name in names]
            for pattern in _dynamic(selection.schemes[scheme], [*rest, *selection.kept], selection):
                override = {"bits": scheme.num_bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}
                dynamic["+:" + pattern] = override
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
            "modules_in_block_to_quantize": [[name] for name in _names_for_optimum(selection)],
            "meta": {"quantizer": [f"quantconvert:{__version__}"]},
        }

    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        return skipped_by(block)

    def width(self, block: Mapping[str, Any], module: str) -> tuple[int, int] | None:
        return width_by(block, module)


_EXPERTS = re.compile(r"\\\.experts\\\.(\\d\+|\d+)\\\..*\$$")


def _dynamic(modules: Sequence[str], others: Sequence[str], selection: Selection) -> list[str]:
    """Regular expressions for `modules`; vLLM and SGLang ask for a layer's experts by `...experts` alone."""
    patterns = (pattern.removeprefix("re:") for pattern in cover(modules, others, selection.fused_pairs))
    return sorted({_EXPERTS.sub(r"\\.experts(\\..*)?$", pattern) for pattern in patterns})


def _names_in_block(modules: Sequence[str]) -> list[str]:
    """The part of each name after the layer number, experts left out (transformers 5 has no modules for them)."""
    dense = (name for name in modules if not re.search(r"\.experts\.\d+\.", name))
    tails = (re.search(r"\.\d+\.(.+)$", name) for name in dense)
    return list(dict.fromkeys(tail[1] for tail in tails if tail))


def _names_for_optimum(selection: Selection) -> list[str]:
    """Names that optimum finds by `endswith` in every block; with their layer where only some layers are quantized."""
    split = set(_names_in_block(selection.quantized)) & set(_names_in_block(selection.kept))
    names: dict[str, None] = {}
    for module in selection.quantized:
        for tail in _names_in_block([module]):
            layer = re.search(r"[^.]+\.\d+\." + re.escape(tail) + "$", module)
            names[layer[0] if tail in split and layer else tail] = None
    return list(names)
