"""Stored scales of activations: numbers that can be scales, and one for all modules that engines load as one."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

from quantconvert.checkpoint import TensorRef
from quantconvert.families import FusedSet, fused_groups
from quantconvert.layouts import LAYOUTS
from quantconvert.sources import Read
from quantconvert.verification.findings import Finding


def check_inputs(
    reads: Sequence[Read], fused: Sequence[FusedSet], read: Callable[[TensorRef], bytes], findings: list[Finding]
) -> None:
    """Append a finding for each scale that is none, and for each set of fused modules with several.

    What they should be is in the statistics that they were taken from, so that no more can be seen of them; that they
    were changed since is seen by the checksums.
    """
    refs = {
        r.module: r.refs[suffix]
        for r in reads
        if r.stored
        for suffix in LAYOUTS[r.stored.layout].constant & r.refs.keys()
    }
    scales = {module: _number(ref, read(ref)) for module, ref in refs.items()}
    for module, scale in scales.items():
        if not (math.isfinite(scale) and scale > 0):
            message = f"expected a positive number as the scale of inputs, got {scale}"
            findings.append(Finding("codes", refs[module].name, message))
    for fused_set, members in fused_groups(scales, fused):
        found = {scales[module] for module in members}
        if len(found) > 1 and all(map(math.isfinite, found)):
            message = f"has other scales of inputs than the rest of {fused_set.name}, whose input is one"
            findings.append(Finding("structure", members[0], message))


def _number(ref: TensorRef, raw: bytes) -> float:
    """The one float of a tensor."""
    raw = b"\0\0" + raw if ref.dtype == "BF16" else raw  # the upper half of a float32
    value: float = struct.unpack("<e" if ref.dtype == "F16" else "<f", raw)[0]
    return value
