"""Looking for NaN and Inf before planning (`--nan-policy keep`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantconvert.buffers import Workspace
from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import Files
from quantconvert.planning import Execution
from quantconvert.run.complaints import nonfinite_text
from quantconvert.run.tiled import count_nonfinite
from quantconvert.sources import Read, open_rows


def find_nonfinite(reads: Sequence[Read], repo: Repo, execution: Execution) -> dict[str, str]:
    """Names of the weights that hold NaN or Inf, with `3 NaN, first at [0, 17]`; reads all of them once."""
    files, work = Files(repo), Workspace()
    try:
        found = {
            r.name: count_nonfinite(open_rows(replace(r, steps=()), files, work, execution.slab_nbytes), r)
            for r in reads
        }
    finally:
        files.close()
    return {name: nonfinite_text(counts) for name, counts in found.items() if counts[2]}
