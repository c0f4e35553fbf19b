"""Number types: what one code is. The only place that knows how many codes there are and where their middle lies.

type   codes          held as (`Quantized.codes`)          element formats
int4   -8 .. 7        uint8, value + midpoint: 0 .. 15     two's complement
uint4  0 .. 15        uint8
int8   -128 .. 127    uint8, value + midpoint: 0 .. 255
uint8  0 .. 255       uint8
e4m3   -448 .. 448    float8_e4m3fn                        OCP 8-bit Floating Point 1.0, E4M3 (no infinities)
e2m1   -6 .. 6        uint8, the four bits                 OCP Microscaling Formats 1.0, section 5.3.3
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2
from typing import Literal

Kind = Literal["int", "float"]


@dataclass(frozen=True, slots=True)
class CodeType:
    """One number type.

    low, high: the smallest and largest value of a code. midpoint: what stands for zero among codes counted from the
    lowest where no zero point is stored, 2^(b-1); 0 for floats, whose codes are values. storage: the safetensors tag of
    codes that are not packed. mantissa_bits, smallest_exponent: of floats, None for whole numbers, which lie 1 apart.
    """

    name: str
    num_bits: int
    low: float
    high: float
    midpoint: int
    storage: str
    mantissa_bits: int | None = None
    smallest_exponent: int = 0

    @property
    def kind(self) -> Kind:
        """`int` or `float`: `type` in compressed-tensors' `QuantizationArgs`."""
        return "int" if self.mantissa_bits is None else "float"

    @property
    def levels(self) -> int:
        """How many bit patterns there are: 2^b."""
        return 1 << self.num_bits

    @property
    def top(self) -> int:
        """The highest code counted from the lowest: 2^b - 1."""
        return self.levels - 1

    @property
    def per_word(self) -> int:
        """How many codes an int32 holds."""
        return 32 // self.num_bits

    def spacing(self, value: float) -> float:
        """How far neighbouring codes lie apart where `value` is: 1 for whole numbers."""
        if self.mantissa_bits is None:
            return 1.0
        exponent = floor(log2(min(abs(value), self.high))) if value else self.smallest_exponent
        return float(2.0 ** (max(exponent, self.smallest_exponent) - self.mantissa_bits))


def _integers(num_bits: int) -> tuple[CodeType, CodeType]:
    half = 1 << (num_bits - 1)
    signed = CodeType(f"int{num_bits}", num_bits, -half, half - 1, half, "I8")
    return signed, CodeType(f"uint{num_bits}", num_bits, 0, 2 * half - 1, half, "U8")


INT4, UINT4 = _integers(4)
INT8, UINT8 = _integers(8)
E4M3 = CodeType("e4m3", 8, -448.0, 448.0, 0, "F8_E4M3", mantissa_bits=3, smallest_exponent=-6)
E2M1 = CodeType("e2m1", 4, -6.0, 6.0, 0, "U8", mantissa_bits=1, smallest_exponent=0)
# The value of each pattern of four bits, the highest bit the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CODE_TYPES: dict[str, CodeType] = {t.name: t for t in (INT4, UINT4, INT8, UINT8, E4M3, E2M1)}
_FOUND = {(t.kind, t.num_bits, t.low < 0): t for t in CODE_TYPES.values()}


def code_type(kind: Kind, num_bits: int, symmetric: bool) -> CodeType:
    """The type of a scheme in compressed-tensors' words: symmetric codes are signed, asymmetric ones are not.

    Raises `KeyError` where there is none.
    """
    return _FOUND[kind, num_bits, symmetric]
