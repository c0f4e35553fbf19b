"""An encoding: 16-bit fixed point, `w = fixed * unit`, with one unit for each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.sources import Cost, Read
from quantconvert.sources.encoding import Context
from quantconvert.sources.rows import Files, Matrix, Rows, matrix_of
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint


class FixedRows:
    """Rows of one weight."""

    def __init__(self, matrix: Matrix, unit_O: Tensor, work: Workspace) -> None:
        self.matrix, self.unit_O, self.work = matrix, unit_O, work

    def rows(self, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        raw = self.matrix.rows(first, last, columns)
        w_OI = self.work.tensor("float", torch.float32, tuple(raw.shape)).copy_(raw)
        return w_OI.mul_(self.unit_O[first:last, None])

    def raw(self, first: int, last: int) -> Mapping[str, Tensor]:
        return {"weight": self.matrix.rows(first, last), "unit": self.unit_O[first:last]}


class Fixed:
    name = "toy-fixed"
    out_first = True
    by_rows = False
    methods = ("toy-fixed",)

    def find(self, context: Context) -> Iterator[Read]:
        for ref in context.refs.values():
            unit = context.refs.get(ref.name.replace(".fixed", ".unit"))
            if ref.name.endswith(".fixed") and unit is not None:
                name = ref.name.removesuffix("fixed") + "weight"
                refs = {"weight": ref, "unit": unit}
                yield Read(name, ref.shape, context.dtype, self.name, refs, num_bits=16)

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        return Cost(2, 4 * read.shape[0])

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        unit = read.refs["unit"]
        unit_O = torch.empty(unit.shape)
        files.read_into(unit.file, bytes_of(unit_O), unit.offset)
        return FixedRows(matrix_of(read, files, work, slab_nbytes), unit_O, work)


TOY = Fixed()


def expected() -> dict[str, Tensor]:
    """The plain model, by name, each matrix rounded to what fixed point holds; in float32."""
    found = {}
    for name, tensor in llama_tensors().items():
        unit_O = tensor.float().abs().amax(1) / 32767 if "_proj" in name else None
        found[name] = tensor if unit_O is None else (tensor.float() / unit_O[:, None]).round() * unit_O[:, None]
    return found


def write_source(folder: Path) -> Path:
    """A small Llama whose linear weights are stored so."""
    tensors = {}
    for name, tensor in llama_tensors().items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        unit_O = tensor.float().abs().amax(1) / 32767
        stem = name.removesuffix("weight")
        tensors[stem + "fixed"] = (tensor.float() / unit_O[:, None]).round().to(torch.int16)
        tensors[stem + "unit"] = unit_O
    return write_checkpoint(folder, tensors, LLAMA_CONFIG | {"quantization_config": {"quant_method": "toy-fixed"}})
