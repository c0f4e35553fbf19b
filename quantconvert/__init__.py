"""quantconvert: Hugging Face checkpoints to int4 and int8, tensor by tensor, in bounded memory.

import quantconvert

plan = quantconvert.plan("path/to/model", bits=4)            # from headers, without torch
result = quantconvert.convert("path/to/model", "out", bits=4)
quantconvert.observe("path/to/model", "stats.safetensors", text="text.txt")  # what its layers read, for `statistics`
found = quantconvert.verify("out", "path/to/model")           # found.is_ok, found.findings, found.errors

Names are imported when they are first used: the command line has to mind signals before anything takes time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantconvert.version import __version__

if TYPE_CHECKING:
    from quantconvert.api import (
        check,
        convert,
        convert_pipeline,
        convert_to_hub,
        dequantize,
        finish,
        inspect,
        is_pipeline,
        iter_quantized,
        observe,
        plan,
        push,
        repack,
        report,
        verify,
    )
    from quantconvert.conversion import Result
    from quantconvert.errors import (
        CheckpointError,
        OutputError,
        QuantConvertError,
        Refusal,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from quantconvert.inventory import Inventory
    from quantconvert.job import Job
    from quantconvert.observation import Observation
    from quantconvert.options import JobOptions
    from quantconvert.planning import Plan
    from quantconvert.schemes import Scheme
    from quantconvert.verification import Verification

__all__ = [
    "CheckpointError",
    "Inventory",
    "Job",
    "JobOptions",
    "Observation",
    "OutputError",
    "Plan",
    "QuantConvertError",
    "Refusal",
    "Result",
    "Scheme",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "check",
    "convert",
    "convert_pipeline",
    "convert_to_hub",
    "dequantize",
    "finish",
    "inspect",
    "is_pipeline",
    "iter_quantized",
    "observe",
    "plan",
    "push",
    "repack",
    "report",
    "verify",
]

_MODULES = {
    "Inventory": "inventory",
    "Job": "job",
    "JobOptions": "options",
    "Observation": "observation",
    "Plan": "planning",
    "Refusal": "errors",
    "Result": "conversion",
    "Scheme": "schemes",
    "Verification": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `quantconvert` has no attribute `{name}`")
    home = "errors" if name.endswith("Error") else _MODULES.get(name, "api")
    value = getattr(import_module(f"quantconvert.{home}"), name)
    globals()[name] = value
    return value
