"""The one table of element types: safetensors tag, bits, torch name, rank in a file, role. A new input dtype is a row.

`rank` is the order in which safetensors lays tensors out in a file (largest first, then by name), that is, the
order of the `Dtype` enum in huggingface/safetensors `safetensors/src/tensor.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type. `is_weight` marks the ones that plain round-to-nearest takes as they are."""

    tag: str
    bits: int
    torch_name: str | None
    rank: int
    is_weight: bool = False


_ROWS = (
    DType("BOOL", 8, "bool", 0),
    DType("F4", 4, None, 1),
    DType("F6_E2M3", 6, None, 2),
    DType("F6_E3M2", 6, None, 3),
    DType("U8", 8, "uint8", 4),
    DType("I8", 8, "int8", 5),
    DType("F8_E5M2", 8, "float8_e5m2", 6),
    DType("F8_E4M3", 8, "float8_e4m3fn", 7),
    DType("F8_E8M0", 8, "float8_e8m0fnu", 8),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", 9),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", 10),
    DType("I16", 16, "int16", 11),
    DType("U16", 16, "uint16", 12),
    DType("F16", 16, "float16", 13, is_weight=True),
    DType("BF16", 16, "bfloat16", 14, is_weight=True),
    DType("I32", 32, "int32", 15),
    DType("U32", 32, "uint32", 16),
    DType("F32", 32, "float32", 17, is_weight=True),
    DType("C64", 64, "complex64", 18),
    DType("F64", 64, "float64", 19),
    DType("I64", 64, "int64", 20),
    DType("U64", 64, "uint64", 21),
)

DTYPES: dict[str, DType] = {row.tag: row for row in _ROWS}


def nbytes_of(tag: str, num_elements: int) -> int:
    """Bytes of `num_elements` packed elements of the type `tag` (a whole number for every type in the table)."""
    return -(-num_elements * DTYPES[tag].bits // 8)
