"""float8 weights with scales: per tensor, per channel, or one for a block of the matrix.

    W[a, b] = float8(a, b) * scale[a // block_rows, b // block_columns]

`weight_scale_inv` is multiplied too, in spite of its name; the last block of each axis may be partial
(vllm `model_executor/layers/quantization/fp8.py`; DeepSeek-V3 `inference/fp8_cast_bf16.py`). A scale of dtype uint8 or
float8_e8m0 is the exponent: 2^(u - 127) (`scale_fmt: ue8m0`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantconvert.checkpoint import TensorRef
from quantconvert.dtypes import DTYPES
from quantconvert.errors import CheckpointError
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources.encoding import Context
from quantconvert.sources.plain import view_cost
from quantconvert.sources.read import Cost, Read

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows

DEFAULT_BLOCK = (128, 128)
SCALE_DTYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
_FLOATS = frozenset(tag for tag in DTYPES if tag.startswith(("F8_E4M3", "F8_E5M2")))
_SUFFIXES = ("_scale_inv", "_scale")


class Fp8:
    """float8 with scales; the detail of a read is (rows, columns) of the stored matrix that share a scale."""

    name = "fp8"
    out_first = False
    by_rows = True
    methods = ("fp8", "fbgemm_fp8")

    def find(self, context: Context) -> Iterator[Read]:
        """Every float8 weight with its scale, wherever that lies; a weight without one is refused."""
        refs = context.refs
        declared = _declared(context.block)
        blocks: dict[Hashable, tuple[int, int]] = {}  # of alike pairs; experts are
        for ref in refs.values():
            if ref.dtype not in _FLOATS:
                continue
            scale = refs.get(ref.name + _SUFFIXES[0]) or refs.get(ref.name + _SUFFIXES[1])
            if scale is None and len(ref.shape) < 3 and not ref.name.endswith(WEIGHT_SUFFIX):
                continue  # a buffer of its own
            try:
                if scale is None:
                    wanted = " or ".join(f"`{ref.name}{suffix}`" for suffix in _SUFFIXES)
                    raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}` is {ref.dtype}: expected {wanted}")
                kind = ref.shape, scale.dtype, scale.shape
                block = blocks.get(kind) or blocks.setdefault(kind, _block(ref, scale, declared))
            except CheckpointError as error:
                context.errors.append(error)
                continue
            tensors = {"weight": ref, "scale": scale}
            yield Read(ref.name, ref.shape, context.dtype, self.name, tensors, num_bits=8, detail=block)

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        """Scales are held from the first row to the last: as stored, as indexes, as float32."""
        scale = read.refs["scale"]
        held = 16 * (scale.num_elements // (scale.shape[0] if read.view.expert is not None else 1))
        return view_cost(read, slab_nbytes, read.view.step, held)

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        """Each value times the scale of its block."""
        from quantconvert.sources.fp8_rows import Fp8Rows
        from quantconvert.sources.rows import matrix_of

        return Fp8Rows(read, matrix_of(read, files, work, slab_nbytes), files, work)


def _declared(block: Mapping[str, Any]) -> tuple[int, int]:
    """The block of elements that share a scale, as the config says."""
    groups = block.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    size = weights.get("block_structure") if isinstance(weights, dict) else None
    size = size or block.get("weight_block_size")
    if size is None:
        return DEFAULT_BLOCK
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"quantization_config has weight_block_size {size!r}: expected two positive numbers")
    return size[0], size[1]


def _block(ref: TensorRef, scale: TensorRef, declared: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of each matrix share a scale; the shapes must agree exactly."""
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"tensor `{scale.name}` in `{scale.file}`: expected a scale as {', '.join(SCALE_DTYPES)}, got {scale.dtype}"
        )
    if len(ref.shape) not in (2, 3) or not ref.num_elements:
        raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}`: expected a float8 matrix, got {list(ref.shape)}")
    rows, columns = ref.shape[-2:]
    lead = ref.shape[:-2]
    tail = scale.shape[len(lead) :]
    blocks = (-(-rows // declared[0]), -(-columns // declared[1]))
    if scale.shape == blocks and rows > 1:
        return declared
    shapes = {
        (): (rows, columns), (1,): (rows, columns), (1, 1): (rows, columns),
        (rows,): (1, columns), (rows, 1): (1, columns), (1, columns): (rows, 1), blocks: declared,
    }  # fmt: skip
    whole = scale.num_elements == 1 and not lead
    if not whole and (scale.shape[: len(lead)] != lead or tail not in shapes):
        raise CheckpointError(
            f"tensor `{scale.name}` in `{scale.file}`: expected shape {[*lead, *blocks]} (blocks of "
            f"{declared[0]} x {declared[1]}), {[*lead, rows, 1]} or one number, for `{ref.name}` {list(ref.shape)}, "
            f"got {list(scale.shape)}"
        )
    return (max(1, rows), max(1, columns)) if whole else shapes[tail]
