"""Reading the codes of a quantized checkpoint, a block of rows at a time. Imports torch.

Shapes: O rows of the block, I columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of, torch_dtype
from quantconvert.errors import UnsupportedError
from quantconvert.layouts import LAYOUTS, Stored
from quantconvert.quantized import Quantized
from quantconvert.sources.codes import specs_of
from quantconvert.sources.rows import Files


class BlockReader:
    """The rows of one stored module. What is stored transposed, or does not depend on rows, is read once and held."""

    def __init__(self, stored: Stored, files: Files, work: Workspace) -> None:
        self.stored, self.files, self.work = stored, files, work
        self.layout = LAYOUTS[stored.layout]
        self.specs = {suffix: spec for suffix, spec in specs_of(stored).items() if suffix in stored.refs}
        self._whole = {
            suffix: self._read(suffix, 0, stored.refs[suffix].shape[0])
            for suffix, spec in self.specs.items()
            if spec.transposed or spec.rows_per_element == 0
        }
        self.scale_tag = stored.scale.dtype
        self.row_multiple = self.layout.row_multiple(stored.scheme)

    def _read(self, suffix: str, first: int, last: int) -> Tensor:
        ref = self.stored.refs[suffix]
        shape = (last - first, *ref.shape[1:])
        tensor = self.work.tensor(f"stored {suffix}", torch_dtype(ref.dtype), shape)
        row = ref.nbytes // ref.shape[0]
        self.files.read_into(ref.file, bytes_of(tensor), ref.offset + first * row)
        return tensor

    def blocks(self, first: int, last: int) -> dict[str, Tensor]:
        """What is stored of rows first..last, by suffix, row axis first; `first` is a multiple of `row_multiple`."""
        assert first % self.row_multiple == 0
        blocks = {}
        for suffix, spec in self.specs.items():
            if spec.rows_per_element == 0:
                blocks[suffix] = self._whole[suffix]
                continue
            begin, end = first // spec.rows_per_element, -(-last // spec.rows_per_element)
            if spec.transposed:
                blocks[suffix] = self._whole[suffix].t()[begin:end].contiguous()
            else:
                blocks[suffix] = self._read(suffix, begin, end)
        return blocks

    def constants(self) -> dict[str, Tensor]:
        """What codes do not decide, by suffix."""
        return {suffix: block for suffix, block in self._whole.items() if suffix in self.layout.constant}

    def quantized(self, first: int, last: int) -> Quantized:
        """The codes of rows first..last."""
        return self.layout.decode(self.blocks(first, last), self.stored, last - first)


class CodesRows:
    """Integer codes of a registered layout, as that layout's own dequantizer gives them."""

    def __init__(self, reader: BlockReader) -> None:
        self.reader = reader

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        begin = first - first % self.reader.row_multiple  # codes or zero points of several rows share a word
        w_OI = self.reader.layout.dequantize(self.reader.quantized(begin, last))[first - begin :]
        return w_OI[:, slice(*columns)].contiguous() if columns else w_OI

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        return self.reader.blocks(first, last)


def recast(quantized: Quantized, dtype: torch.dtype, stored: Stored) -> Quantized:
    """The same with scales in the dtype that another layout stores; refuses where that would change a scale."""
    scale = quantized.scale.to(dtype)
    if not torch.equal(scale.float(), quantized.scale.float()):
        raise UnsupportedError(
            f"`{stored.module}` has scales that {dtype} does not hold exactly: repacking would change its weights",
            hint="choose a format that stores scales in the weight's own dtype: compressed-tensors or rtn",
        )
    return replace(quantized, scale=scale)
