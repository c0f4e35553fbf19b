"""Every stored tensor in exactly one place: counted before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from quantconvert.checkpoint import Checkpoint
from quantconvert.planning.tasks import Task
from quantconvert.sources import Dropped


def check_accounts(checkpoint: Checkpoint, tasks: Sequence[Task], dropped: Sequence[Dropped]) -> None:
    """Assert that each tensor of the checkpoint ends in one place: in one task, or in each of its parts, or dropped.

    What steps look at besides (a norm whose factor goes into the weights after it) must be in a place of its own too,
    however many tasks read it. A failure is a mistake of ours, never the user's.
    """
    sources = [task.source for task in tasks]
    read = Counter([ref.name for source in sources for ref in source.refs.values()])
    read.update([gone.ref.name for gone in dropped])
    parts = {ref.name: source.parts for source in sources if source.parts > 1 for ref in source.refs.values()}
    partners = {ref.name for source in sources for step in source.steps for ref in step.partners}
    wrong = [ref.name for ref in checkpoint.tensors if read.get(ref.name) != parts.get(ref.name, 1)]
    assert not wrong, f"not read exactly once: {wrong[:5]}"
    assert len(read) == len(checkpoint.tensors), f"{len(read)} of {len(checkpoint.tensors)} tensors are accounted for"
    assert partners <= read.keys(), f"steps look at tensors that are nowhere: {sorted(partners - read.keys())[:5]}"
