"""What is kept beside a shard that is not on this machine any more: what a run that continues has to know of it."""

from __future__ import annotations

import json

from quantconvert.errors import OutputError
from quantconvert.planning import Plan
from quantconvert.run.folder import differences, identity
from quantconvert.run.journal import entry_of, parse_entry
from quantconvert.run.outlet import Shipped


def job_bytes(plan: Plan) -> bytes:
    """Which conversion shards are of, for those who come later."""
    return json.dumps(identity(plan), indent=1).encode()


def check_job(content: bytes, plan: Plan, where: str, hint: str) -> None:
    """Raise `OutputError` where that is another one, `ValueError` where it cannot be read."""
    if found := differences(json.loads(content), identity(plan)):
        raise OutputError(f"{where} holds shards of another conversion: {'; '.join(found[:3])}", hint=hint)


def sidecar_bytes(file: str, shard: Shipped) -> bytes:
    """The sha256, and a line of the journal for each task."""
    tasks = [entry_of(index, result) for index, result in sorted(shard.results.items())]
    return json.dumps({"file": file, "sha256": shard.sha256, "basis": shard.basis, "tasks": tasks}).encode()


def read_sidecar(content: bytes, plan: Plan, number: int) -> Shipped | None:
    """The same back; None where it is not of this shard of the plan."""
    try:
        value = json.loads(content)
        file, sha256, basis, tasks = value["file"], value["sha256"], value["basis"], value["tasks"]
        results = dict(filter(None, (parse_entry(task, plan) for task in tasks)))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    is_whole = file == plan.shards[number].file and results.keys() == set(plan.by_shard[number])
    return Shipped(str(sha256), results, str(basis)) if is_whole else None
