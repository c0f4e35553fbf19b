"""Every stored tensor in exactly one place: counted before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.checkpoint import Checkpoint
from quantconvert.planning.tasks import Task
from quantconvert.sources import Dropped


def check_accounts(checkpoint: Checkpoint, tasks: Sequence[Task], dropped: Sequence[Dropped]) -> None:
    """Assert that each tensor of the checkpoint ends in one place: in one task, or in each of its parts, or dropped.

    What steps look at besides (a norm whose factor goes into the weights after it) must be in a place of its own too,
    however many tasks read it. A failure is a mistake of ours, never the user's.
    """
    read: dict[str, int] = {}
    parts: dict[str, int] = {}
    partners: set[str] = set()
    for task in tasks:
        source = task.source
        for ref in source.refs.values():
            read[ref.name] = read.get(ref.name, 0) + 1
            if source.parts > 1:
                parts[ref.name] = source.parts
        for step in source.steps:
            partners.update([ref.name for ref in step.partners])
    for gone in dropped:
        read[gone.ref.name] = read.get(gone.ref.name, 0) + 1
    wrong = [ref.name for ref in checkpoint.tensors if read.get(ref.name) != parts.get(ref.name, 1)]
    assert not wrong, f"not read exactly once: {wrong[:5]}"
    assert len(read) == len(checkpoint.tensors), f"{len(read)} of {len(checkpoint.tensors)} tensors are accounted for"
    assert partners <= read.keys(), f"steps look at tensors that are nowhere: {sorted(partners - read.keys())[:5]}"
