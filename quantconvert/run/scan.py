"""Looking for NaN and Inf before planning (`--nan-policy keep`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantconvert.checkpoint import TensorRef
from quantconvert.run.io import Files, Workspace
from quantconvert.run.tasks import count_nonfinite, nonfinite_text


def find_nonfinite(refs: Sequence[TensorRef], root: Path) -> dict[str, str]:
    """Names of the weights that hold NaN or Inf, with `3 NaN, first at [0, 17]`; reads all of them once."""
    files, work = Files(root), Workspace()
    try:
        found = {ref.name: count_nonfinite(files, ref, work) for ref in refs}
    finally:
        files.close()
    return {name: nonfinite_text(counts) for name, counts in found.items() if counts[2]}
