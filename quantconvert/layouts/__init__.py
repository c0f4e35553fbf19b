"""The registry of output layouts. A new one is a file and a line here."""

from __future__ import annotations

from quantconvert.layouts.awq import Awq
from quantconvert.layouts.base import Layout, Packed, Packing, Selection, Stored, TensorSpec
from quantconvert.layouts.compressed_tensors import CompressedTensors
from quantconvert.layouts.fp8 import Fp8Blocks
from quantconvert.layouts.gptq import Gptq
from quantconvert.layouts.mlx import Mlx
from quantconvert.layouts.simple import Simple
from quantconvert.registry import Registry

__all__ = ["LAYOUTS", "Layout", "Packed", "Packing", "Selection", "Stored", "TensorSpec"]

LAYOUTS: Registry[Layout] = Registry(
    "format", Awq(), CompressedTensors(), Gptq(), Simple(), Fp8Blocks(), Mlx(), also=("auto",)
)
