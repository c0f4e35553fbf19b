"""Integer codes in a registered layout, whoever wrote them: compressed-tensors, GPTQ, AWQ and our own."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError
from quantconvert.layouts import LAYOUTS, Layout, Stored, TensorSpec
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources.encoding import Context
from quantconvert.sources.read import Cost, Read

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows

FLOATS = ("F16", "BF16", "F32")


class Codes:
    """Modules of a registered layout; the detail of a read is what the layout says of it (`Stored`)."""

    name = "codes"
    out_first = True
    by_rows = False

    @property
    def methods(self) -> tuple[str, ...]:
        """The layouts' own names, whichever are registered."""
        return tuple(LAYOUTS)

    def find(self, context: Context) -> Iterator[Read]:
        """Every quantized module of the layout that config.json names, with its tensors checked against it."""
        layout = LAYOUTS.get(context.method or "")
        if layout is None:
            return
        if not any(is_quantized(ref) and not is_activation_scale(ref.name) for ref in context.refs.values()):
            return
        for stored in find_stored(context, layout, tuple(context.refs.values())):
            dtype = stored.scale.dtype if stored.scale.dtype in FLOATS else context.dtype
            yield Read(
                stored.module + WEIGHT_SUFFIX, stored.shape, dtype, self.name, stored.refs,
                num_bits=stored.scheme.num_bits, detail=stored,
            )  # fmt: skip

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        """What is stored transposed is read whole, and held; rows that share a word are read together."""
        assert read.stored is not None
        held = sum(spec.nbytes for spec in specs_of(read.stored).values() if spec.transposed)
        return Cost(4, held, row_multiple=LAYOUTS[read.stored.layout].row_multiple(read.stored.scheme))

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        """Values as the layout's own dequantizer gives them."""
        from quantconvert.sources.blocks import BlockReader, CodesRows

        assert read.stored is not None
        return CodesRows(BlockReader(read.stored, files, work))


# Scales of activations and of the key/value cache: they belong to the source's quantization and end with it.
_ACTIVATION_SCALES = re.compile(
    r"\.(input_scale|input_global_scale|activation_scale|input_scale_ub|input_zero_point|output_scale|[kqv]_scale|kv_scale|prob_scale)$"
)


def is_activation_scale(name: str) -> bool:
    """Whether a tensor of that name is a scale of something that is not stored."""
    return _ACTIVATION_SCALES.search(name) is not None


def find_stored(context: Context, layout: Layout, tensors: Sequence[TensorRef]) -> list[Stored]:
    """Every quantized module among `tensors`, in their order.

    Each module's tensors are checked against what the layout promises; contradictions are appended to the errors.
    """
    modules: dict[str, dict[str, TensorRef]] = {}
    for ref in tensors:
        module, _, suffix = ref.name.rpartition(".")
        if suffix in layout.suffixes:
            modules.setdefault(module, {})[suffix] = ref
    modules = {module: refs for module, refs in modules.items() if refs.keys() - layout.constant}
    errors = context.errors
    found = _read_modules(layout, context, modules)
    known = {ref.name for stored in found for ref in stored.refs.values()}
    others = [ref for ref in tensors if ref.name not in known and not is_activation_scale(ref.name)]
    stray = [ref for ref in others if is_quantized(ref)]
    if stray and not errors:
        errors.append(
            UnsupportedError(
                f"{len(stray)} tensors belong to a quantization that is not read: "
                f"{', '.join(f'`{ref.name}`' for ref in stray[:3])}"
            )
        )
    if not found and not errors:
        location = context.checkpoint.location
        errors.append(UnsupportedError(f"`{location}` says `{layout.name}` but holds no quantized weight"))
    if not all(stored.scheme.symmetric for stored in found) and layout.zeros_tell_symmetry:
        found = [replace(stored, scheme=replace(stored.scheme, symmetric=False)) for stored in found]
    return found


_SUFFIXES = (
    "weight_packed", "qweight", "qzeros", "scales", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_shape", "weight_g_idx", "input_scale", "input_zero_point", "weight_global_scale", "g_idx", "SCB",
)  # fmt: skip


def is_quantized(ref: TensorRef) -> bool:
    """Whether a tensor can only be part of a quantized weight."""
    return _is_part(ref.name.rpartition(".")[2], ref.dtype, frozenset(LAYOUTS))


@lru_cache(maxsize=4096)  # there are few last words of names
def _is_part(last: str, dtype: str, layouts: frozenset[str]) -> bool:
    own = {suffix for name in layouts for suffix in LAYOUTS[name].suffixes if suffix != "weight"}
    mxfp4 = dtype == "U8" and last.endswith(("_blocks", "_scales"))
    tiny = last == "weight" and dtype.startswith(("F8", "F4", "F6"))
    return last in _SUFFIXES or last in own or last.endswith(("_scale_inv", "_proj_scale")) or mxfp4 or tiny


def _read_modules(layout: Layout, context: Context, modules: Mapping[str, Mapping[str, TensorRef]]) -> list[Stored]:
    """Every module that the layout's reader recognises; whatever does not fit the config is a refusal."""
    found = []
    errors = context.errors
    where = "quantization_config"
    try:
        reader = layout.reader(context.block, context.read)
        for where, refs in modules.items():
            try:
                stored = reader(where, refs)
                if stored is not None:
                    found.append(_checked(replace(stored, layout=layout.name, scale_suffix=layout.scale_suffix)))
            except QuantConvertError as error:
                named = where in error.message
                errors.append(error if named else type(error)(f"`{where}`: {error.message}", hint=error.hint))
    except QuantConvertError as error:
        errors.append(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StopIteration, struct.error) as error:
        reason = f"{type(error).__name__} {error}"
        errors.append(CheckpointError(f"`{where}` does not fit its quantization_config: {reason}"))
    return found


def specs_of(stored: Stored) -> dict[str, TensorSpec]:
    """What its layout promises for a stored module, by suffix."""
    return {spec.suffix: spec for spec in LAYOUTS[stored.layout].stored_outputs(stored)}


def _checked(stored: Stored) -> Stored:
    """A module whose tensors are what its layout promises; raises `CheckpointError`."""
    if stored.scale_suffix not in stored.refs:
        raise CheckpointError(f"`{stored.module}` has no `{stored.scale_suffix}`: its codes mean nothing without")
    if "weight" in stored.refs and "weight_packed" in stored.refs:
        raise CheckpointError(f"`{stored.module}` has both `weight` and `weight_packed`: expected one of them")
    for suffix, spec in specs_of(stored).items():
        ref = stored.refs.get(suffix)
        optional = suffix in LAYOUTS[stored.layout].optional
        if ref is None and not optional:
            raise CheckpointError(f"`{stored.module}` has no `{suffix}`: its quantization_config asks for one")
        own = suffix == stored.scale_suffix and not stored.scheme.scales
        kind = FLOATS if own or spec.dtype in FLOATS else (spec.dtype,)
        if ref is not None and ref.dtype not in kind:
            raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}`: expected {' or '.join(kind)}, got {ref.dtype}")
        if ref is not None and ref.shape != spec.shape:
            raise CheckpointError(
                f"tensor `{ref.name}` in `{ref.file}`: expected shape {list(spec.shape)} for "
                f"{stored.scheme.label}, got {list(ref.shape)}"
            )
    return stored
