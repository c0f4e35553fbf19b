"""Finding the quantized modules of a checkpoint, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError
from quantconvert.formats import FORMATS, Format, Stored
from quantconvert.formats.base import TensorSpec


def find_stored(
    checkpoint: Checkpoint, read: Callable[[TensorRef], bytes], errors: list[QuantConvertError]
) -> tuple[Format, list[Stored]]:
    """The format that config.json names, and every quantized module in the order of the checkpoint.

    `read` returns the bytes of a small tensor. Each module's tensors are checked against what its format promises;
    contradictions are appended to `errors`. Raises `UnsupportedError` where there is no format that we read.
    """
    block = quantization_block(checkpoint)
    method = str(block.get("quant_method", "")) if block else ""
    fmt = FORMATS.get(method)
    if block is None or fmt is None:
        found = f"quant_method `{method}`" if block else "no quantization_config"
        raise UnsupportedError(
            f"`{checkpoint.location}` is not quantized in a layout that can be read back: config.json has {found}",
            hint=f"layouts: {', '.join(FORMATS)}",
        )
    modules: dict[str, dict[str, TensorRef]] = {}
    for ref in checkpoint.tensors:
        module, _, suffix = ref.name.rpartition(".")
        if suffix in fmt.suffixes:
            modules.setdefault(module, {})[suffix] = ref
    reader = fmt.reader(block, read)
    stored = []
    for module, refs in modules.items():
        try:
            one = reader(module, refs)
            if one is not None:
                _check(fmt, one)
                stored.append(one)
        except QuantConvertError as error:
            errors.append(error)
        except (KeyError, ValueError) as error:
            errors.append(CheckpointError(f"`{module}` does not fit its quantization_config: {error}"))
    if not stored and not errors:
        errors.append(UnsupportedError(f"`{checkpoint.location}` says `{method}` but holds no quantized weight"))
    return fmt, stored


def quantization_block(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The `quantization_config` of config.json, wherever writers put it."""
    for config in (checkpoint.config, checkpoint.text_config):
        for key in ("quantization_config", "compression_config"):
            if isinstance(config.get(key), dict):
                block: Mapping[str, Any] = config[key]
                return block
    return None


def specs_of(fmt: Format, stored: Stored) -> dict[str, TensorSpec]:
    """What the format promises for a stored module, by suffix."""
    dtype = next(ref.dtype for suffix, ref in stored.refs.items() if suffix in ("scales", "weight_scale"))
    return {spec.suffix: spec for spec in fmt.outputs(stored.shape, dtype, stored.scheme)}


def _check(fmt: Format, stored: Stored) -> None:
    for suffix, spec in specs_of(fmt, stored).items():
        ref = stored.refs.get(suffix)
        optional = suffix in ("g_idx", "weight_shape")
        if ref is None and not optional:
            raise CheckpointError(f"`{stored.module}` has no `{suffix}`: its quantization_config asks for one")
        if ref is not None and ref.shape != spec.shape:
            raise CheckpointError(
                f"tensor `{ref.name}` in `{ref.file}`: expected shape {list(spec.shape)} for "
                f"{stored.scheme.label}, got {list(ref.shape)}"
            )
