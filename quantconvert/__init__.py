"""quantconvert: Hugging Face checkpoints to int4 and int8, tensor by tensor, in bounded memory.

import quantconvert

plan = quantconvert.plan("path/to/model", bits=4)            # from headers, without torch
result = quantconvert.convert("path/to/model", "out", bits=4)
found = quantconvert.verify("out", "path/to/model")           # found.is_ok, found.findings, found.errors
"""

from quantconvert.api import Result, convert, dequantize, inspect, iter_quantized, plan, repack, verify
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
from quantconvert.job import Job, JobOptions
from quantconvert.planning import Plan
from quantconvert.schemes import Scheme
from quantconvert.verification import Verification
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
    "Verification",
    "VerificationError",
    "__version__",
    "convert",
    "dequantize",
    "inspect",
    "iter_quantized",
    "plan",
    "repack",
    "verify",
]
