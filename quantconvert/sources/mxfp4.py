"""MXFP4, as gpt-oss has it: four-bit floats, 32 of which share an exponent.

    X_blocks uint8 [.., rows, G, 16], low nibble first     X_scales uint8 [.., rows, G]
    W[row, 32 * g + i] = E2M1(nibble i) * 2^(scale - 127); a scale of 255 is NaN

Sources: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1; transformers `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError
from quantconvert.sources.encoding import Context
from quantconvert.sources.plain import view_cost
from quantconvert.sources.read import Cost, Read

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows

GROUP, GROUP_NBYTES = 32, 16
BLOCKS, SCALES = "_blocks", "_scales"


class Mxfp4:
    """Pairs of blocks and scales, as one tensor [.., rows, columns] without the `_blocks` in its name."""

    name = "mxfp4"
    out_first = True
    by_rows = False
    methods = ("mxfp4",)

    def find(self, context: Context) -> Iterator[Read]:
        """Every pair; blocks without scales of the right shape are refused."""
        for ref in context.refs.values():
            if not ref.name.endswith(BLOCKS) or ref.dtype != "U8":
                continue
            name = ref.name.removesuffix(BLOCKS)
            try:
                scales = _scales(ref, context.refs.get(name + SCALES), name + SCALES)
            except CheckpointError as error:
                context.errors.append(error)
                continue
            shape = (*ref.shape[:-2], ref.shape[-2] * GROUP)
            tensors = {"blocks": ref, "scales": scales}
            yield Read(name, shape, context.dtype, self.name, tensors, num_bits=4)

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        """Bytes, as whole numbers for looking them up."""
        return view_cost(read, slab_nbytes, 4 * read.view.step)

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        """Values by table, times powers of two."""
        from quantconvert.sources.mxfp4_rows import Mxfp4Rows
        from quantconvert.sources.rows import Matrix, matrix_of

        scales = Matrix(read.refs["scales"], read.view, files, work)
        return Mxfp4Rows(matrix_of(read, files, work, slab_nbytes), scales, work)


def _scales(ref: TensorRef, scales: TensorRef | None, name: str) -> TensorRef:
    """The scales of a tensor of blocks; raises `CheckpointError` where the two do not fit."""
    if scales is None:
        raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}` has no partner `{name}`")
    if len(ref.shape) < 3 or ref.shape[-1] != GROUP_NBYTES or not ref.num_elements:
        raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}`: expected [.., 16] bytes, got {list(ref.shape)}")
    if scales.shape != ref.shape[:-1] or scales.dtype != "U8":
        raise CheckpointError(
            f"tensor `{scales.name}` in `{scales.file}`: expected U8 {list(ref.shape[:-1])}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    return scales
