"""quantconvert: Hugging Face checkpoints to int4 and int8, tensor by tensor, in bounded memory.

import quantconvert

plan = quantconvert.plan("path/to/model", bits=4)            # from headers, without torch
result = quantconvert.convert("path/to/model", "out", bits=4)
inventory = quantconvert.inspect("out")
"""

from quantconvert.api import Result, convert, dequantize, inspect, iter_quantized, plan, repack
from quantconvert.errors import (
    CheckpointError,
    OutputError,
    QuantConvertError,
    Refusal,
    UnsupportedError,
    UsageError,
)
from quantconvert.inventory import Inventory
from quantconvert.job import Job, JobOptions
from quantconvert.planning import Plan
from quantconvert.schemes import Scheme
from quantconvert.version import __version__

__all__ = [
    "CheckpointError",
    "Inventory",
    "Job",
    "JobOptions",
    "OutputError",
    "Plan",
    "QuantConvertError",
    "Refusal",
    "Result",
    "Scheme",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "convert",
    "dequantize",
    "inspect",
    "iter_quantized",
    "plan",
    "repack",
]
