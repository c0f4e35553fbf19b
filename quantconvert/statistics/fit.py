"""Whether statistics are of the checkpoint that they are to serve."""

from __future__ import annotations

from collections.abc import Mapping

from quantconvert.errors import CheckpointError, QuantConvertError, some
from quantconvert.statistics.reader import Statistics


def check_fit(
    statistics: Statistics, model_type: str, widths: Mapping[str, int], errors: list[QuantConvertError]
) -> None:
    """Append to `errors` where the checkpoint has another type, lacks a module, or has one of another width.

    widths: in_features of every linear module of the checkpoint.
    """
    hint = "observe this checkpoint: quantconvert observe SRC STATS.safetensors --text FILE (or --self)"
    where = f"--statistics `{statistics.path}`"
    if statistics.model_type != model_type:
        message = f"{where} are of another model: expected model_type `{model_type}`, got `{statistics.model_type}`"
        errors.append(CheckpointError(message, hint=hint))
    strange = [module for module in statistics.inputs if module not in widths]
    if strange:
        message = f"{where} are of {len(strange)} modules that the checkpoint has not: {some(strange)}"
        errors.append(CheckpointError(message, hint=hint))
    found = []
    for module, width in widths.items():
        ref = statistics.second_moment(module)
        if ref is not None and ref.shape[0] != width:
            found.append(f"\n  `{module}`: expected {width} columns, got {ref.shape[0]}")
    if found:
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        errors.append(CheckpointError(f"{where} are of another width:{''.join(found[:10])}{more}", hint=hint))
