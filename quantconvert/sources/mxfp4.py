"""MXFP4, as gpt-oss has it: four-bit floats, 32 of which share an exponent.

    X_blocks uint8 [.., rows, G, 16], low nibble first     X_scales uint8 [.., rows, G]
    W[row, 32 * g + i] = E2M1(nibble i) * 2^(scale - 127); a scale of 255 is NaN

Sources: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1; transformers `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError
from quantconvert.sources.read import Weight

GROUP, GROUP_NBYTES = 32, 16
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCKS, SCALES = "_blocks", "_scales"


def find_mxfp4(refs: Mapping[str, TensorRef], dtype: str, errors: list[QuantConvertError]) -> list[Weight]:
    """Every pair of blocks and scales, as one tensor [.., rows, columns] without the `_blocks` in its name."""
    found = []
    for ref in refs.values():
        if not ref.name.endswith(BLOCKS) or ref.dtype != "U8":
            continue
        name = ref.name.removesuffix(BLOCKS)
        scales = refs.get(name + SCALES)
        if scales is None:
            errors.append(CheckpointError(f"tensor `{ref.name}` in `{ref.file}` has no partner `{name + SCALES}`"))
            continue
        if len(ref.shape) < 3 or ref.shape[-1] != GROUP_NBYTES or not ref.num_elements:
            errors.append(
                CheckpointError(f"tensor `{ref.name}` in `{ref.file}`: expected [.., 16] bytes, got {list(ref.shape)}")
            )
            continue
        if scales.shape != ref.shape[:-1] or scales.dtype != "U8":
            errors.append(
                CheckpointError(
                    f"tensor `{scales.name}` in `{scales.file}`: expected U8 {list(ref.shape[:-1])}, "
                    f"got {scales.dtype} {list(scales.shape)}"
                )
            )
            continue
        shape = (*ref.shape[:-2], ref.shape[-2] * GROUP)
        found.append(Weight(name, shape, dtype, "mxfp4", {"blocks": ref, "scales": scales}, num_bits=4))
    return found
