"""Finding the quantized modules of a checkpoint, whoever wrote it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError
from quantconvert.layouts import LAYOUTS, Layout, Stored
from quantconvert.layouts.base import TensorSpec

FLOATS = ("F16", "BF16", "F32")


def find_stored(
    checkpoint: Checkpoint,
    tensors: Sequence[TensorRef],
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
) -> tuple[Layout, list[Stored]]:
    """The format that config.json names, and every quantized module among `tensors`, in their order.

    `read` returns the bytes of a small tensor. Each module's tensors are checked against what its format promises;
    contradictions are appended to `errors`. Raises `UnsupportedError` where there is no format that we read.
    """
    block = checkpoint.quantization_block
    method = str(block.get("quant_method", "")) if block else ""
    fmt = LAYOUTS.get(method)
    if block is None or fmt is None:
        found = f"quant_method `{method}`" if block else "no quantization_config"
        raise UnsupportedError(
            f"`{checkpoint.location}` is not quantized in a layout that can be read back: config.json has {found}",
            hint=f"layouts: {', '.join(LAYOUTS)}",
        )
    modules: dict[str, dict[str, TensorRef]] = {}
    for ref in tensors:
        module, _, suffix = ref.name.rpartition(".")
        if suffix in fmt.suffixes:
            modules.setdefault(module, {})[suffix] = ref
    stored = _read_modules(fmt, block, modules, read, errors)
    known = {ref.name for one in stored for ref in one.refs.values()}
    stray = [ref for ref in tensors if ref.name not in known and is_quantized(ref)]
    if stray and not errors:
        errors.append(
            UnsupportedError(
                f"{len(stray)} tensors belong to a quantization that is not read: "
                f"{', '.join(f'`{ref.name}`' for ref in stray[:3])}"
            )
        )
    if not stored and not errors:
        errors.append(UnsupportedError(f"`{checkpoint.location}` says `{method}` but holds no quantized weight"))
    if not all(one.scheme.symmetric for one in stored) and fmt.zeros_tell_symmetry:
        stored = [replace(one, scheme=replace(one.scheme, symmetric=False)) for one in stored]
    return fmt, stored


_SUFFIXES = (
    "weight_packed", "qweight", "qzeros", "scales", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_shape", "weight_g_idx", "input_scale", "input_zero_point", "weight_global_scale", "g_idx", "SCB",
)  # fmt: skip


def is_quantized(ref: TensorRef) -> bool:
    """Whether a tensor can only be part of a quantized weight."""
    last = ref.name.rpartition(".")[2]
    mxfp4 = ref.dtype == "U8" and last.endswith(("_blocks", "_scales"))
    tiny = last == "weight" and ref.dtype.startswith(("F8", "F4", "F6"))
    return last in _SUFFIXES or last.endswith(("_scale_inv", "_proj_scale")) or mxfp4 or tiny


def _read_modules(
    fmt: Layout,
    block: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, TensorRef]],
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
) -> list[Stored]:
    """Every module that the format's reader recognises; whatever does not fit the config is a refusal."""
    stored = []
    where = "quantization_config"
    try:
        reader = fmt.reader(block, read)
        for where, refs in modules.items():
            try:
                one = reader(where, refs)
                if one is not None:
                    _check(fmt, one)
                    stored.append(one)
            except QuantConvertError as error:
                named = where in error.message
                errors.append(error if named else type(error)(f"`{where}`: {error.message}", hint=error.hint))
    except QuantConvertError as error:
        errors.append(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StopIteration, struct.error) as error:
        reason = f"{type(error).__name__} {error}"
        errors.append(CheckpointError(f"`{where}` does not fit its quantization_config: {reason}"))
    return stored


def specs_of(fmt: Layout, stored: Stored) -> dict[str, TensorSpec]:
    """What the format promises for a stored module, by suffix."""
    return {spec.suffix: spec for spec in fmt.outputs(stored.shape, stored.scale.dtype, stored.scheme)}


def _check(fmt: Layout, stored: Stored) -> None:
    if stored.scale_suffix not in stored.refs:
        raise CheckpointError(f"`{stored.module}` has no `{stored.scale_suffix}`: its codes mean nothing without")
    if "weight" in stored.refs and "weight_packed" in stored.refs:
        raise CheckpointError(f"`{stored.module}` has both `weight` and `weight_packed`: expected one of them")
    for suffix, spec in specs_of(fmt, stored).items():
        ref = stored.refs.get(suffix)
        optional = suffix in ("g_idx", "weight_shape")
        if ref is None and not optional:
            raise CheckpointError(f"`{stored.module}` has no `{suffix}`: its quantization_config asks for one")
        kind = FLOATS if suffix == stored.scale_suffix else (spec.dtype,)
        if ref is not None and ref.dtype not in kind:
            raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}`: expected {' or '.join(kind)}, got {ref.dtype}")
        if ref is not None and ref.shape != spec.shape:
            raise CheckpointError(
                f"tensor `{ref.name}` in `{ref.file}`: expected shape {list(spec.shape)} for "
                f"{stored.scheme.label}, got {list(ref.shape)}"
            )
