"""Options, declared once: `table` has them, `option` says what one is."""

from quantconvert.options.option import Declared, Option, check_values, parse_size, read_group, size_text
from quantconvert.options.table import (
    DEFAULT_DTYPE,
    ConvertOptions,
    DequantizeWords,
    JobOptions,
    LimitOptions,
    NanPolicy,
    ObserveOptions,
    OnIndivisible,
    PlainDType,
    PlanOptions,
    RankOptions,
    SourceOptions,
    StreamOptions,
    TranscodeOptions,
    VerifyOptions,
)

__all__ = [
    "DEFAULT_DTYPE",
    "ConvertOptions",
    "Declared",
    "DequantizeWords",
    "JobOptions",
    "LimitOptions",
    "NanPolicy",
    "ObserveOptions",
    "OnIndivisible",
    "Option",
    "PlainDType",
    "PlanOptions",
    "RankOptions",
    "SourceOptions",
    "StreamOptions",
    "TranscodeOptions",
    "VerifyOptions",
    "check_values",
    "parse_size",
    "read_group",
    "size_text",
]
