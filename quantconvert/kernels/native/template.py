"""What every call for one weight has in common."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from quantconvert.kernels.native.fields import ALONG, ELEMENTS, WAYS, Call, PackedFields, StepFields, order_of
from quantconvert.kernels.native.library import address_of
from quantconvert.layouts import Layout, Packed, Packing
from quantconvert.schemes import Scheme
from quantconvert.sources import Read
from quantconvert.sources.steps.scale import Scale

if TYPE_CHECKING:
    from quantconvert.sources.rows import Files


class Steps(NamedTuple):
    """Steps as C reads them. held: the factors that `fields` points to."""

    fields: ctypes.Array[StepFields]
    held: Sequence[memoryview]


def read_steps(source: Read, files: Files | None) -> Steps:
    """The steps of a weight; none of them where there are no files to read factors from."""
    scales = [step for step in source.steps if isinstance(step, Scale)] if files else []
    held = [memoryview(step.floats(files)) for step in scales] if files else []
    fields = [
        StepFields(address_of(factors), step.start, WAYS[step.way]) for step, factors in zip(scales, held, strict=True)
    ]
    return Steps((StepFields * len(fields))(*fields), held)


def call_of(source: Read, element: str, scheme: Scheme, layout: Layout, packing: Packing, steps: Steps) -> Call:
    """A call without rows, which are of dtype `element`, and without places for what it writes."""
    columns = source.matrix[1]
    return Call(
        columns=columns,
        group_size=scheme.group_size or columns,
        steps=steps.fields,
        num_steps=len(steps.fields),
        element=ELEMENTS[element],
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
        steps=steps.fields,
        num_steps=len(steps.fields),
        element=ELEMENTS[source.values.dtype],
        dtype=ELEMENTS[dtype],
    )


def _packed(packed: Packed | None) -> PackedFields:
    if packed is None:
        return PackedFields(along=ALONG["nothing"])
    return PackedFields(None, ALONG[packed.along], packed.shift, order_of(packed.order))
