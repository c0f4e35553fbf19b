"""What every call for one weight has in common."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quantconvert.kernels.native.fields import (
    ALONG,
    ELEMENTS,
    STORED,
    WAYS,
    Call,
    MeaningFields,
    PackedFields,
    StepFields,
    order_of,
)
from quantconvert.kernels.native.library import address_of
from quantconvert.layouts import Layout, Packed, Packing
from quantconvert.schemes import Scheme
from quantconvert.sources import Read
from quantconvert.sources.elements import block_scales, table_of
from quantconvert.sources.steps.scale import Scale

if TYPE_CHECKING:
    from quantconvert.sources.rows import Files


class Steps(NamedTuple):
    """What stored elements mean, and steps, as C reads them. held: what these point to."""

    meaning: MeaningFields | None
    fields: ctypes.Array[StepFields]
    held: Sequence[object]


def read_meaning(source: Read, files: Files) -> tuple[MeaningFields | None, Sequence[object]]:
    """What a weight's stored elements mean beside their dtype, None where nothing; and what that points to."""
    table, scales, view = table_of(source.values.dtype), block_scales(source, files), source.view
    if table is None and scales is None:
        return None, ()
    fields = MeaningFields(start=view.start, step=view.step, table=None if table is None else address_of(table))
    if scales is not None:
        fields.scales, fields.width = address_of(scales.values), scales.width
        fields.rows, fields.columns = scales.block
    return fields, (table, scales)


def read_steps(source: Read, files: Files | None) -> Steps:
    """The meaning and the steps of a weight; nothing where there are no files to read from, as others have done it."""
    meaning, known = read_meaning(source, files) if files else (None, ())
    scales = [step for step in source.steps if isinstance(step, Scale)] if files else []
    held = [memoryview(step.floats(files)) for step in scales] if files else []
    fields = [
        StepFields(address_of(factors), step.start, WAYS[step.way]) for step, factors in zip(scales, held, strict=True)
    ]
    return Steps(meaning, (StepFields * len(fields))(*fields), (*known, *held))


def call_of(source: Read, element: str, scheme: Scheme, layout: Layout, packing: Packing, steps: Steps) -> Call:
    """A call without rows, which are of dtype `element`, and without places for what it writes."""
    columns = source.matrix[1]
    return Call(
        columns=columns,
        group_size=scheme.group_size or columns,
        meaning=pointer_to(steps.meaning),
        steps=steps.fields,
        num_steps=len(steps.fields),
        element=STORED[element],
        dtype=ELEMENTS[source.dtype],
        scale_dtype=ELEMENTS[layout.scale_dtype(source.dtype)],
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        codes=_packed(packing.codes),
        zeros=_packed(packing.zeros),
    )


def plain_call_of(source: Read, dtype: str, steps: Steps) -> Call:
    """The same for rows that stay plain numbers, of `dtype`."""
    return Call(
        columns=source.matrix[1],
        group_size=source.matrix[1],
        meaning=pointer_to(steps.meaning),
        steps=steps.fields,
        num_steps=len(steps.fields),
        element=STORED[source.values.dtype],
        dtype=ELEMENTS[dtype],
    )


def pointer_to(meaning: MeaningFields | None) -> Any:
    """A pointer that keeps what it points to."""
    return ctypes.pointer(meaning) if meaning is not None else None


def _packed(packed: Packed | None) -> PackedFields:
    if packed is None:
        return PackedFields(along=ALONG["nothing"])
    return PackedFields(None, ALONG[packed.along], packed.shift, order_of(packed.order))
