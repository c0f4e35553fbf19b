"""Reading the codes of a quantized checkpoint, a block of rows at a time.

Shapes: O rows of the block, I columns, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantconvert.errors import UnsupportedError
from quantconvert.layouts import Layout, Stored
from quantconvert.methods.base import Quantized
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.schemes import Scheme
from quantconvert.sources.codes import specs_of


class BlockReader:
    """The rows of one stored module. What is stored transposed, or does not depend on rows, is read once and held."""

    def __init__(self, fmt: Layout, stored: Stored, files: Files, work: Workspace) -> None:
        self.format, self.stored, self.files, self.work = fmt, stored, files, work
        self.specs = {suffix: spec for suffix, spec in specs_of(fmt, stored).items() if suffix in stored.refs}
        self._whole = {
            suffix: self._read(suffix, 0, stored.refs[suffix].shape[0])
            for suffix, spec in self.specs.items()
            if spec.transposed or spec.rows_per_element == 0
        }
        self.scale_tag = stored.scale.dtype
        self.row_multiple = fmt.row_multiple(stored.scheme)

    @property
    def column_groups(self) -> Tensor | None:
        """GPTQ's `g_idx` [I], where columns are not in the order of their groups."""
        return self._whole["g_idx"].long() if self.stored.reordered else None

    def _read(self, suffix: str, first: int, last: int) -> Tensor:
        ref = self.stored.refs[suffix]
        shape = (last - first, *ref.shape[1:])
        tensor = self.work.tensor(f"stored {suffix}", torch_dtype(ref.dtype), shape)
        row = ref.nbytes // ref.shape[0]
        self.files.read_into(ref.file, bytes_of(tensor), ref.offset + first * row)
        return tensor

    def rows(self, first: int, last: int) -> Quantized:
        """Rows first..last, which start at a multiple of the format's `row_multiple`."""
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
        return self.format.decode(blocks, self.stored, last - first)


def dequantize(quantized: Quantized, scheme: Scheme, column_groups: Tensor | None = None) -> Tensor:
    """float32 [O, I] = (codes - zero_point) * scale, each product rounded once.

    column_groups: the group of each column [I], where it is not `column // group_size`.
    """
    codes_OI, scale_OG = quantized.codes, quantized.scale.float()
    zero_OG = quantized.zero_points(scheme).float()
    if column_groups is not None:
        return (codes_OI.float() - zero_OG[:, column_groups]) * scale_OG[:, column_groups]
    rows, columns = codes_OI.shape
    w_OGS = codes_OI.float().view(rows, scale_OG.shape[1], columns // scale_OG.shape[1])
    return w_OGS.sub_(zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1)).view(rows, columns)


def recast(quantized: Quantized, dtype: torch.dtype, stored: Stored) -> Quantized:
    """The same with scales in the dtype that another layout stores; refuses where that would change a scale."""
    scale = quantized.scale.to(dtype)
    if not torch.equal(scale.float(), quantized.scale.float()):
        raise UnsupportedError(
            f"`{stored.module}` has scales that {dtype} does not hold exactly: repacking would change its weights",
            hint="choose a format that stores scales in the weight's own dtype: compressed-tensors or rtn",
        )
    return Quantized(quantized.codes, scale, quantized.zero_point)
