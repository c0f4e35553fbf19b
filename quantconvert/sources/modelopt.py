"""NVFP4 as NVIDIA's ModelOpt stores it; its float8 is read as any other (`quantconvert.sources.fp8`).

    X.weight          uint8 [O, I/2], the even column in the lower half, float4 (E2M1)
    X.weight_scale    float8_e4m3fn [O, I/16]
    X.weight_scale_2  float32, one number: multiplied, where compressed-tensors stores what divides
    W[o, 16 * g + i] = E2M1(nibble i) * weight_scale[o, g] * weight_scale_2

config.json says `quant_method: modelopt`, or `hf_quant_config.json` beside it says it alone; tensors tell. Sources:
vLLM `model_executor/layers/quantization/modelopt.py`; compressed-tensors `entrypoints/convert/converters`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources.encoding import Context
from quantconvert.sources.read import Cost, Read

if TYPE_CHECKING:
    from quantconvert.buffers import Workspace
    from quantconvert.sources.rows import Files, Rows

GROUP = 16
SCALE, SCALE_2 = "_scale", "_scale_2"


class ModelOpt:
    """float4 under two scales."""

    name = "modelopt"
    out_first = True
    by_rows = False
    methods = ("modelopt", "modelopt_fp4")

    def find(self, context: Context) -> Iterator[Read]:
        """Every weight of bytes that has a second scale; scales of another shape are refused."""
        for ref in context.refs.values():
            if ref.dtype != "U8" or not ref.name.endswith(WEIGHT_SUFFIX) or ref.name + SCALE_2 not in context.refs:
                continue
            try:
                scale, second = _scales(ref, context)
            except CheckpointError as error:
                context.errors.append(error)
                continue
            shape = (ref.shape[0], ref.shape[1] * 2)
            tensors = {"weight": ref, "scale": scale, "scale_2": second}
            yield Read(ref.name, shape, context.dtype, self.name, tensors, num_bits=4)

    def cost(self, read: Read, slab_nbytes: int) -> Cost:
        """Bytes, as whole numbers for looking them up, and scales as float32."""
        return Cost(4)

    def open(self, read: Read, files: Files, work: Workspace, slab_nbytes: int) -> Rows:
        """Values by table, times both scales."""
        from quantconvert.sources.modelopt_rows import ModelOptRows

        return ModelOptRows(read, files, work)


def _scales(ref: TensorRef, context: Context) -> tuple[TensorRef, TensorRef]:
    """Both scales of a weight; raises `CheckpointError` where they do not fit."""
    second, scale = context.refs[ref.name + SCALE_2], context.refs.get(ref.name + SCALE)
    if scale is None:
        raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}` has no partner `{ref.name}{SCALE}`")
    if len(ref.shape) != 2 or not ref.num_elements or ref.shape[1] * 2 % GROUP:
        raise CheckpointError(f"tensor `{ref.name}` in `{ref.file}`: expected [O, I/2] bytes, got {list(ref.shape)}")
    wanted = (ref.shape[0], ref.shape[1] * 2 // GROUP)
    if scale.dtype != "F8_E4M3" or scale.shape != wanted:
        raise CheckpointError(
            f"tensor `{scale.name}` in `{scale.file}`: expected F8_E4M3 {list(wanted)}, got {scale.dtype} "
            f"{list(scale.shape)}"
        )
    if second.dtype != "F32" or second.num_elements != 1:
        raise CheckpointError(
            f"tensor `{second.name}` in `{second.file}`: expected one F32, got {second.dtype} {list(second.shape)}"
        )
    return scale, second
