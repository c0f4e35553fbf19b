"""`quantconvert.json`, which each conversion leaves beside the checkpoint: what was done, and checksums of the result.

No time, host name or path of this machine stands in it: the same source and options give the same report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantconvert.planning import Plan
from quantconvert.verify.model import TensorError
from quantconvert.version import __version__

REPORT_NAME = "quantconvert.json"
_CHUNK = 1 << 20


def sha256_of(path: Path, pulse: Callable[[], None] = lambda: None) -> str:
    """Hexadecimal sha256 of a file's bytes; `pulse` is called now and then, and may raise."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            pulse()
    return digest.hexdigest()


def hash_files(
    folder: Path, names: tuple[str, ...], workers: int, pulse: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """sha256 of each file, by path relative to `folder`."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        sums = pool.map(lambda name: sha256_of(folder / name, pulse), names)
        return dict(zip(names, sums, strict=True))


def report_of(plan: Plan, errors: Mapping[str, TensorError], files: Mapping[str, str]) -> dict[str, Any]:
    """The content of the report: `errors` by module, `files` with their sha256."""
    checkpoint = plan.checkpoint
    return {
        "quantconvert_version": __version__,
        "source": {
            "repository": checkpoint.location if checkpoint.revision else None,
            "revision": checkpoint.revision,
            "files": {file.path: file.nbytes for file in checkpoint.weight_files},
            "layout_sha256": plan.source_digest,
        },
        "job": plan.job.to_json(),
        "format": plan.format,
        "source_format": plan.source_format,
        "plan_sha256": plan.digest,
        "tensors": {task.source.name: _tensor(task, errors) for task in plan.quantized},
        "files": dict(sorted(files.items())),
    }


def _tensor(task: Any, errors: Mapping[str, TensorError]) -> dict[str, Any]:
    error = errors.get(task.source.name)
    value: dict[str, Any] = {"scheme": task.scheme.label if task.scheme else "plain"}
    if error is not None:
        value |= {"relative_error": error.relative_error, "sqnr": error.sqnr}
    return value


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, None where there is none; raises `ValueError` where it is none of ours."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    if path.stat().st_size > 200_000_000:
        raise ValueError("larger than 200 MB")
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        raise ValueError("no `files` in it")
    return value
