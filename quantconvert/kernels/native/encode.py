"""A tile to the C library and back. Imports torch.

Legend: O rows of the tile, I columns, G groups of a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import torch_dtype
from quantconvert.kernels.native.library import (
    ALONG,
    ELEMENTS,
    Call,
    Library,
    PackedFields,
    StepFields,
    Wrong,
    order_of,
)
from quantconvert.layouts import Layout, Packed, Packing, TensorSpec
from quantconvert.methods import Noise, NonFinite, ScaleOverflow
from quantconvert.schemes import Scheme
from quantconvert.sources import Read
from quantconvert.sources.rows import Files
from quantconvert.sources.steps.scale import Scale

_TAGS = {torch_dtype(tag): number for tag, number in ELEMENTS.items()}


class Encoder:
    """One weight's `Encode`. files: where the factors of its steps are read; None where its rows come after them."""

    def __init__(
        self,
        library: Library,
        level: int,
        source: Read,
        scheme: Scheme,
        layout: Layout,
        packing: Packing,
        files: Files | None,
    ) -> None:
        self.library, self.level, self.packing = library, level, packing
        self.scheme, self.width = scheme, source.shape[1]
        self.dtype, self.scale_tag = ELEMENTS[source.dtype], layout.scale_dtype(source.dtype)
        self.specs = {spec.suffix: spec for spec in layout.outputs(source.shape, source.dtype, scheme)}
        self.scale_suffix = layout.scale_suffix
        self.shaped = layout.shaped(scheme, source.shape)
        scales = [step for step in source.steps if isinstance(step, Scale)] if files else []
        self.factors = [step.read(files) for step in scales] if files else []
        self.steps = _steps(scales, self.factors)

    def __call__(self, rows: Mapping[str, Tensor], first: int, span: Any, noise: Noise) -> dict[str, Tensor]:
        w_OI = rows["weight"]
        w_OI = w_OI if w_OI.stride(1) == 1 or w_OI.shape[1] == 1 else w_OI.contiguous()
        blocks = {self.scale_suffix: self._block(self.scale_suffix, w_OI.shape[0])}
        ends = None if span is None else torch.cat((span.low.view(1), span.high.view(1)))
        call = Call(
            weights=w_OI.data_ptr(),
            stride=w_OI.stride(0),
            rows=w_OI.shape[0],
            columns=self.width,
            group_size=self.scheme.group_size or self.width,
            first_row=first,
            steps=self.steps,
            num_steps=len(self.steps),
            span=None if ends is None else ends.data_ptr(),
            element=_TAGS[w_OI.dtype],
            dtype=self.dtype,
            scale_dtype=ELEMENTS[self.scale_tag],
            num_bits=self.scheme.num_bits,
            symmetric=self.scheme.symmetric,
            codes=self._packed(self.packing.codes, w_OI.shape[0], blocks),
            zeros=self._packed(self.packing.zeros, w_OI.shape[0], blocks),
            scales=blocks[self.scale_suffix].data_ptr(),
        )
        wrong = self.library.quantize(call, self.level)
        if wrong:
            _raise(wrong)
        noise.noise += call.noise
        noise.signal += call.signal
        return blocks | self.shaped

    def _packed(self, packed: Packed | None, num_rows: int, blocks: dict[str, Tensor]) -> PackedFields:
        """Where the library puts what `packed` says: a new block, which is added to `blocks`."""
        if packed is None:
            return PackedFields(along=ALONG["nothing"])
        block = blocks[packed.suffix] = self._block(packed.suffix, num_rows)
        return PackedFields(block.data_ptr(), ALONG[packed.along], packed.shift, order_of(packed.order))

    def _block(self, suffix: str, num_rows: int) -> Tensor:
        """Room for what `num_rows` rows make of an output, row axis first."""
        spec: TensorSpec = self.specs[suffix]
        dtype = torch_dtype(spec.dtype)
        if len(spec.shape) == 1:
            return torch.empty(spec.shape, dtype=dtype)
        width = spec.shape[0] if spec.transposed else spec.shape[1]
        return torch.empty(-(-num_rows // spec.rows_per_element), width, dtype=dtype)


def _steps(scales: Sequence[Scale], factors: Sequence[Tensor]) -> ctypes.Array[StepFields]:
    fields = [
        StepFields(values.data_ptr(), step.start, step.way == "columns")
        for step, values in zip(scales, factors, strict=True)
    ]
    return (StepFields * len(fields))(*fields)


def _raise(wrong: Wrong) -> None:
    if Wrong.NO_MEMORY in wrong:
        raise MemoryError
    raise NonFinite if Wrong.NONFINITE in wrong else ScaleOverflow
