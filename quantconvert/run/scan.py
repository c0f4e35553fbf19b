"""Looking for NaN and Inf before planning (`--nan-policy keep`)."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.checkpoint import Repo
from quantconvert.planning import Execution
from quantconvert.run.io import Files, Workspace
from quantconvert.run.readers import open_reader
from quantconvert.run.work import count_nonfinite, nonfinite_text
from quantconvert.sources import Source


def find_nonfinite(sources: Sequence[Source], repo: Repo, execution: Execution) -> dict[str, str]:
    """Names of the weights that hold NaN or Inf, with `3 NaN, first at [0, 17]`; reads all of them once."""
    files, work = Files(repo), Workspace()
    try:
        found = {s.name: count_nonfinite(open_reader(s, files, work, execution), s) for s in sources}
    finally:
        files.close()
    return {name: nonfinite_text(counts) for name, counts in found.items() if counts[2]}
