"""`quantconvert.json`, which each conversion leaves beside the checkpoint: what was done, and checksums of the result.

No time, host name or path of this machine stands in it: the same source and options give the same report.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantconvert.checkpoint import Repo
from quantconvert.checkpoint.ranges import open_regular
from quantconvert.errors import OutputError
from quantconvert.factors.summary import Summary
from quantconvert.planning import Plan, Task
from quantconvert.planning.tasks import role_of
from quantconvert.verification.findings import TensorError
from quantconvert.version import __version__

REPORT_NAME = "quantconvert.json"
_CHUNK, MAX_NBYTES = 1 << 20, 200_000_000
# What has a line an entry.
_BY_LINE = ("tensors", "kept")
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')

# Sums of squares by weight: of its error, and of the weight.
Noises = Mapping[str, tuple[float, float]]
# What the report says of each weight.
Tensors = Mapping[str, Mapping[str, Any]]


def sha256_of(path: Path, stop: Callable[[], bool] = lambda: False) -> str:
    """Hexadecimal sha256 of a file's bytes; raises `InterruptedError` once `stop` says so."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if stop():
                raise InterruptedError
    return digest.hexdigest()


def hash_files(folder: Path, names: Sequence[str], workers: int) -> dict[str, str]:
    """sha256 of each file, by path relative to `folder`; raises `OutputError` where one cannot be read."""
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            sums = list(pool.map(lambda name: sha256_of(folder / name, stop.is_set), names))
        except BaseException as error:
            stop.set()
            if isinstance(error, OSError):
                raise OutputError(f"cannot read back `{error.filename}`: {error.strerror}") from error
            raise
    return dict(zip(names, sums, strict=True))


def report_of(
    plan: Plan, tensors: Tensors, files: Mapping[str, str], factors: Summary | None, command: str
) -> dict[str, Any]:
    """The content of the report: `tensors_of` the plan, sha256 of the result's files; by layer the factors that columns
    were divided by, the tensors in high precision that steps changed, and the command.

    Of the source's files it has sizes, their sha256 where the Hub or its cache says it, and one digest of the names,
    dtypes, shapes and places of all tensors.
    """
    checkpoint = plan.checkpoint
    known = {file.path: file.sha256 for file in checkpoint.weight_files if file.sha256}
    changed = [task.source.name for task in plan.kept if task.source.steps]
    return {
        "quantconvert_version": __version__,
        "source": {
            "repository": checkpoint.location if checkpoint.revision else None,
            "revision": checkpoint.revision,
            "files": {file.path: file.nbytes for file in checkpoint.weight_files},
            **({"sha256": known} if known else {}),
            "layout_sha256": plan.source_digest,
        },
        "command": command,
        "job": plan.job.to_json(),
        **({"statistics": plan.statistics.to_json()} if plan.statistics else {}),
        "format": plan.format,
        "source_format": plan.source_format,
        "plan_sha256": plan.digest,
        **({"budget": plan.budget.to_json()} if plan.budget else {}),
        "size": {"source_nbytes": checkpoint.nbytes, "nbytes": plan.total_size},
        "tensors": tensors,
        "kept": {task.source.name: {"reason": str(task.reason), **_sizes(task)} for task in plan.kept},
        **({"factors": factors.to_json()} if factors else {}),
        **({"changed": changed} if changed else {}),
        "files": dict(sorted(files.items())),
    }


def tensors_of(plan: Plan, errors: Mapping[str, TensorError], noises: Noises) -> Tensors:
    """By weight: scheme, sizes, and how far it, as it was after its steps, is from its source, with the sums of squares
    that this comes from (six figures), so that they can be added up over layers.
    """
    return {task.source.name: _tensor(task, errors, noises) for task in plan.quantized}


def _tensor(task: Task, errors: Mapping[str, TensorError], noises: Noises) -> dict[str, Any]:
    name = task.source.name
    value = {"scheme": task.scheme.label if task.scheme else "plain", **_sizes(task)}
    if name in noises:
        error, (noise, signal) = errors[name], noises[name]
        value |= {"relative_error": error.relative_error, "sqnr": error.sqnr}
        value |= {"noise": float(f"{noise:.6g}"), "signal": float(f"{signal:.6g}")}
    return value


def _sizes(task: Task) -> dict[str, Any]:
    return {
        "role": role_of(task),
        "num_elements": task.num_elements,
        "source_nbytes": task.source.nbytes,
        "nbytes": task.output_nbytes,
    }


def report_bytes(value: Mapping[str, Any]) -> bytes:
    """The file's content, ending with a checksum of everything before it, so that it can vouch for itself."""
    return _dumps({**value, "sha256": hashlib.sha256(_dumps(value)).hexdigest()})


def _dumps(value: Mapping[str, Any]) -> bytes:
    rows = [f"  {_json(key)}: {_entry(key, item)}" for key, item in value.items()]
    return ("{\n" + ",\n".join(rows) + "\n}\n").encode()


def _entry(key: str, value: Any) -> str:
    if key not in _BY_LINE or not value:
        return _json(value, indent=2).replace("\n", "\n  ")
    return "{\n" + ",\n".join(f"    {_json(name)}: {_json(item)}" for name, item in value.items()) + "\n  }"


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


def source_of(repo: Repo) -> tuple[str, str | None] | None:
    """The Hub repository and commit that a result's report names as its source; None where it names none."""
    file = next((file for file in repo.files() if file.path == REPORT_NAME), None)
    if file is None or file.nbytes > MAX_NBYTES:
        return None
    try:
        source = json.loads(repo.read(REPORT_NAME, 0, file.nbytes))["source"]
        return (str(source["repository"]), source["revision"]) if source["repository"] else None
    except (ValueError, TypeError, KeyError):
        return None


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, None where there is none; raises `ValueError` where it was changed or is none of ours."""
    path = folder / REPORT_NAME
    if not path.exists():
        return None
    with open(path, "rb", opener=open_regular) as file:
        content = file.read(MAX_NBYTES + 1)
    return parse_report(content)


def parse_report(content: bytes) -> dict[str, Any]:
    """The report that the bytes hold; raises `ValueError` where they were changed or are none of ours."""
    if len(content) > MAX_NBYTES:
        raise ValueError(f"larger than {MAX_NBYTES} bytes")
    value = json.loads(content)
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        raise ValueError("no `files` in it")
    seal = _SEAL.search(content)
    if seal is None or hashlib.sha256(content[: seal.start()] + b"\n}\n").hexdigest() != seal[1].decode():
        raise ValueError("it was changed after the conversion")
    return value
