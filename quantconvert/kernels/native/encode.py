"""A tile to the C library and back. Imports torch.

Legend: O rows of the tile, I columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import torch_dtype
from quantconvert.kernels.native.fields import Call
from quantconvert.kernels.native.library import Library
from quantconvert.kernels.native.template import call_of, read_steps
from quantconvert.kernels.native.unit import raise_wrong
from quantconvert.layouts import Layout, Packing, TensorSpec
from quantconvert.methods import BadInputs, Noise
from quantconvert.schemes import Scheme
from quantconvert.sources import Read
from quantconvert.sources.rows import Files


class Encoder:
    """One weight's `Encode`. files: where the factors of its steps are read; None where its rows come after them.
    is_searched: what the first pass found are importances, float32 [I]."""

    def __init__(
        self,
        library: Library,
        level: int,
        source: Read,
        scheme: Scheme,
        layout: Layout,
        packing: Packing,
        files: Files | None,
        is_searched: bool = False,
    ) -> None:
        self.library, self.level, self.is_searched = library, level, is_searched
        self.specs = {spec.suffix: spec for spec in layout.outputs(source.shape, source.dtype, scheme)}
        self.codes, self.zeros = packing.codes.suffix, packing.zeros.suffix if packing.zeros else None
        self.scales = layout.scale_suffix
        self.shaped = layout.shaped_tensors(scheme, source.shape)
        self.steps = read_steps(source, files)
        element = source.values.dtype if files else "F32"
        self.call = call_of(source, element, scheme, layout, packing, self.steps)

    def __call__(self, rows: Mapping[str, Tensor], first: int, span: Any, noise: Noise) -> dict[str, Tensor]:
        w_OI = rows["weight"]
        w_OI = w_OI if w_OI.stride(1) == 1 or w_OI.shape[1] == 1 else w_OI.contiguous()
        names = (self.scales, self.codes, *((self.zeros,) if self.zeros else ()))
        blocks = {name: self._block(name, w_OI.shape[0]) for name in names}
        importance = span if self.is_searched else None
        if importance is not None and len(importance) != w_OI.shape[1]:
            raise BadInputs(f"{len(importance)} importances for {w_OI.shape[1]} columns")
        ends = None if span is None or self.is_searched else torch.cat((span.low.view(1), span.high.view(1)))
        call = Call.from_buffer_copy(self.call)
        call.weights, call.stride, call.rows, call.first_row = w_OI.data_ptr(), w_OI.stride(0), w_OI.shape[0], first
        call.importance = None if importance is None else importance.data_ptr()
        call.span = None if ends is None else ends.data_ptr()
        call.scales, call.codes.bytes = blocks[self.scales].data_ptr(), blocks[self.codes].data_ptr()
        if self.zeros:
            call.zeros.bytes = blocks[self.zeros].data_ptr()
        wrong = self.library.quantize(call, self.level)
        if wrong:
            raise_wrong(wrong)
        noise.noise += call.noise
        noise.signal += call.signal
        return blocks | self.shaped

    def _block(self, suffix: str, num_rows: int) -> Tensor:
        """Room for what `num_rows` rows make of an output, row axis first."""
        spec: TensorSpec = self.specs[suffix]
        dtype = torch_dtype(spec.dtype)
        if len(spec.shape) == 1:
            return torch.empty(spec.shape, dtype=dtype)
        width = spec.shape[0] if spec.transposed else spec.shape[1]
        return torch.empty(-(-num_rows // spec.rows_per_element), width, dtype=dtype)
