"""The registry of output layouts. A new one is a file and a line here."""

from __future__ import annotations

from quantconvert.errors import UsageError
from quantconvert.formats.awq import Awq
from quantconvert.formats.base import Format, Selection, Stored, TensorSpec
from quantconvert.formats.compressed_tensors import CompressedTensors
from quantconvert.formats.gptq import Gptq
from quantconvert.formats.rtn import Rtn

__all__ = ["FORMATS", "Format", "Selection", "Stored", "TensorSpec", "get_format"]

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Awq(), CompressedTensors(), Gptq(), Rtn())}


def get_format(name: str) -> Format:
    """The registered format `name`; raises `UsageError` with the known ones."""
    if name not in FORMATS:
        raise UsageError(f"--format: unknown format `{name}`", hint=f"known formats: auto, {', '.join(FORMATS)}")
    return FORMATS[name]
