"""The registry of output layouts. A new one is a file and a line here."""

from __future__ import annotations

from quantconvert.errors import UsageError
from quantconvert.layouts.awq import Awq
from quantconvert.layouts.base import Layout, Selection, Stored, TensorSpec
from quantconvert.layouts.compressed_tensors import CompressedTensors
from quantconvert.layouts.gptq import Gptq
from quantconvert.layouts.simple import Simple

__all__ = ["LAYOUTS", "Layout", "Selection", "Stored", "TensorSpec", "get_layout"]

LAYOUTS: dict[str, Layout] = {fmt.name: fmt for fmt in (Awq(), CompressedTensors(), Gptq(), Simple())}


def get_layout(name: str) -> Layout:
    """The registered format `name`; raises `UsageError` with the known ones."""
    if name not in LAYOUTS:
        raise UsageError(f"--format: unknown format `{name}`", hint=f"known formats: auto, {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
