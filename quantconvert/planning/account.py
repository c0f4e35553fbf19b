"""Every stored tensor in exactly one place: counted before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from quantconvert.checkpoint import Checkpoint
from quantconvert.planning.plan import Task
from quantconvert.sources import Dropped, Weight


def check_accounts(checkpoint: Checkpoint, tasks: Sequence[Task], dropped: Sequence[Dropped]) -> None:
    """Assert that the tasks read each tensor of the checkpoint once, in as many parts as it has, or that it is dropped.

    A failure is a mistake of ours, never the user's.
    """
    read: Counter[str] = Counter()
    parts: dict[str, int] = {}
    for task in tasks:
        count = task.source.parts if isinstance(task.source, Weight) else 1
        for ref in task.inputs:
            read[ref.name] += 1
            parts[ref.name] = count
    for one in dropped:
        read[one.ref.name] += 1
        parts.setdefault(one.ref.name, 1)
    wrong = [ref.name for ref in checkpoint.tensors if read[ref.name] != parts.get(ref.name)]
    assert not wrong, f"not read exactly once: {wrong[:5]}"
    assert len(read) == len(checkpoint.tensors), f"{len(read)} of {len(checkpoint.tensors)} tensors are accounted for"
