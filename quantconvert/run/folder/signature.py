"""Which conversion an output folder belongs to: everything that decides its bytes, by a name to show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.planning import Plan
from quantconvert.version import __version__

STATE_VERSION = 2


def identity(plan: Plan) -> dict[str, Any]:
    """Everything that decides the bytes of a conversion, as flat JSON values by a name to show."""
    checkpoint = plan.checkpoint
    value: dict[str, Any] = {
        "state version": STATE_VERSION,
        "quantconvert version": __version__,
        "source": _source(checkpoint),
        "revision": checkpoint.revision,
        **dict(_flat(plan.job.to_json())),
        "format written": plan.format,
        "format of the source": plan.source_format,
        "dtype": plan.plain_dtype,
    }
    for file in (*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.rewritten_files):
        value[f"size of {file.path}"] = file.nbytes
        value[f"mtime of {file.path}"] = file.version.mtime_ns if file.version else None
    if plan.statistics:
        value["size of the statistics"] = plan.statistics.version.nbytes
        value["mtime of the statistics"] = plan.statistics.version.mtime_ns
        value["header of the statistics"] = plan.statistics.digest
    value["plan"] = plan.digest
    flat: dict[str, Any] = json.loads(json.dumps(value))
    return flat


def _source(checkpoint: Checkpoint) -> str:
    """The Hub id, the address, or the folder in a spelling that does not depend on where the user stands."""
    location = checkpoint.location
    if checkpoint.revision or "://" in location:
        return location
    return str(Path(location).expanduser().resolve())


def _flat(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by their own names; those of the scheme that most weights have are not nested."""
    for key, item in value.items():
        yield from item.items() if isinstance(item, dict) else [(key, item)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`bits was 4, is 8` for every field that differs; the plan's digest only where nothing else explains it.

    A modification time that one side does not know (the same Hub repository, once from its cache) is no difference.
    """
    missing = object()
    found = []
    for key in (*old, *(key for key in new if key not in old)):
        before, now = old.get(key, missing), new.get(key, missing)
        if before == now or (key.startswith("mtime of ") and (before is None or now is None)):
            continue
        before, now = ("absent" if value is missing else json.dumps(value) for value in (before, now))
        found.append(f"`{key}` was {before}, is {now}")
    return [text for text in found if not text.startswith("`plan` ")] or found
