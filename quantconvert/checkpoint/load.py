"""From a repository's files to a `Checkpoint`: config, index and headers, with all problems reported together."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from quantconvert.checkpoint.files import INDEX_NAME, SINGLE_NAME, TORCH_INDEX_NAME, TORCH_NAME, kind_of
from quantconvert.checkpoint.header import TensorRef, is_utf8, parse_object, read_header
from quantconvert.checkpoint.model import Checkpoint, Repo, RepoFile
from quantconvert.checkpoint.torch_file import read_torch_file
from quantconvert.errors import CheckpointError, QuantConvertError, raise_all

MAX_JSON_NBYTES = 200_000_000
_PART = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.safetensors$")
MAX_CONFIG_NBYTES = 10_000_000


def load_checkpoint(repo: Repo) -> Checkpoint:
    """Read config.json, the index and every header of `repo`; no tensor data.

    Raises `CheckpointError`, or a `Refusal` with all of them, when something is missing or malformed.
    """
    files = {file.path: file for file in repo.files()}
    if not files:
        raise CheckpointError(f"source `{repo.location}` is an empty folder")
    errors: list[QuantConvertError] = []
    config = _read_config(repo, files, errors)
    weight_map, names = _weight_files(repo, files, errors)
    tensors = _read_headers(repo, [files[name] for name in names if name in files], errors)
    _check_index(weight_map, tensors, errors)
    _check_duplicates(tensors, errors)
    raise_all(errors)
    weights = {*names, INDEX_NAME, TORCH_INDEX_NAME}
    rest = [file for path, file in files.items() if path not in weights]
    card = repo.read("README.md", 0, 1_000_000).decode("utf-8", "replace") if "README.md" in files else None
    return Checkpoint(
        location=repo.location,
        revision=repo.revision,
        config=config,
        card=card,
        tensors=tuple(tensors),
        weight_files=tuple(files[name] for name in names),
        side_files=tuple(file for file in rest if kind_of(file.path) == "side"),
        rewritten_files=tuple(file for file in rest if kind_of(file.path) == "rewritten"),
        dropped_files=tuple(file for file in rest if kind_of(file.path) == "duplicate"),
    )


def _read_json(repo: Repo, file: RepoFile, limit: int) -> dict[str, Any]:
    if file.nbytes > limit:
        raise CheckpointError(f"`{file.path}` is too large: expected at most {limit} bytes, got {file.nbytes}")
    value = parse_object(repo.read(file.path, 0, file.nbytes), f"`{file.path}`")
    if not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise CheckpointError(f"`{file.path}` holds text that is not UTF-8")
    return value


def _read_config(repo: Repo, files: dict[str, RepoFile], errors: list[QuantConvertError]) -> dict[str, Any]:
    if "config.json" not in files:
        inside = sorted({path.split("/")[0] for path in files if path.endswith("/config.json")})
        errors.append(
            CheckpointError(
                f"no config.json in `{repo.location}`",
                hint=f"one sub-folder has its own: try `{repo.location}/{inside[0]}`" if inside else None,
            )
        )
        return {}
    try:
        return _read_json(repo, files["config.json"], MAX_CONFIG_NBYTES)
    except CheckpointError as error:
        errors.append(error)
        return {}


def _weight_files(
    repo: Repo, files: dict[str, RepoFile], errors: list[QuantConvertError]
) -> tuple[dict[str, str] | None, list[str]]:
    """The index's weight_map (None without an index) and the safetensors files that make up the checkpoint."""
    index, single = _kind(files)
    if index in files and single not in files:
        try:
            weight_map = _read_json(repo, files[index], MAX_JSON_NBYTES).get("weight_map")
        except CheckpointError as error:
            errors.append(error)
            return None, []
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            errors.append(CheckpointError(f"`{index}` has no weight_map from tensor names to file names"))
            return None, []
        names = sorted(set(weight_map.values()))
        for name in names:
            if "/" in name or "\\" in name or "\0" in name or name.startswith("."):
                errors.append(CheckpointError(f"`{index}` names `{name}`: expected a file beside it"))
            elif name not in files:
                count = sum(1 for file in weight_map.values() if file == name)
                errors.append(
                    CheckpointError(
                        f"`{name}` is missing: `{index}` says that it holds {count} tensors",
                        hint="download the missing file; every file named in the index must be there",
                    )
                )
        return weight_map, names
    if single in files:
        return None, [single]
    shards = [path for path in files if path.endswith(".safetensors") and "/" not in path]
    names = [path for path in shards if not path.startswith(("consolidated", "adapter_"))] or shards
    parts = [match for match in map(_PART.search, names) if match]
    have, count = {int(match[1]) for match in parts}, max((int(match[2]) for match in parts), default=0)
    missing = sorted(set(range(1, count + 1)) - have)
    if missing:
        errors.append(CheckpointError(f"shards {missing[:5]} of {count} are missing in `{repo.location}`"))
    if not names:
        others = sorted(path for path in files if path.endswith((".bin", ".pth", ".pt", ".gguf")))
        found = f"; found {', '.join(others[:3])}" if others else ""
        errors.append(CheckpointError(f"no *.safetensors in `{repo.location}`{found}"))
    return None, names


def _kind(files: dict[str, RepoFile]) -> tuple[str, str]:
    """The names of the index and of a single file: safetensors where there are any, else torch's own."""
    if any(path.endswith(".safetensors") and "/" not in path for path in files) or INDEX_NAME in files:
        return INDEX_NAME, SINGLE_NAME
    return (TORCH_INDEX_NAME, TORCH_NAME) if {TORCH_INDEX_NAME, TORCH_NAME} & set(files) else (INDEX_NAME, SINGLE_NAME)


def _read_headers(repo: Repo, files: list[RepoFile], errors: list[QuantConvertError]) -> list[TensorRef]:
    def read(file: RepoFile) -> list[TensorRef] | CheckpointError:
        try:
            if file.path.endswith(".bin"):  # torch reads those from the disk
                return read_torch_file(repo.materialize((file.path,)) / file.path, file.path)
            return read_header(lambda offset, n: repo.read(file.path, offset, n), file.path, file.nbytes)
        except CheckpointError as error:
            return error

    tensors: list[TensorRef] = []
    with ThreadPoolExecutor(8 if repo.revision and len(files) > 1 else 1) as pool:
        for result in pool.map(read, files):
            if isinstance(result, CheckpointError):
                errors.append(result)
            else:
                tensors += result
    return tensors


def _check_index(weight_map: dict[str, str] | None, tensors: list[TensorRef], errors: list[QuantConvertError]) -> None:
    """Every tensor that the index promises must be in its file; asked only when all headers could be read.

    A tensor that the index does not name is taken all the same: engines read whole files.
    """
    if weight_map is None or errors:
        return
    at = {(ref.name, ref.file) for ref in tensors}
    for name, file in weight_map.items():
        if (name, file) not in at:
            index = TORCH_INDEX_NAME if file.endswith(".bin") else INDEX_NAME
            errors.append(CheckpointError(f"tensor `{name}` is not in `{file}`, where `{index}` puts it"))


def _check_duplicates(tensors: list[TensorRef], errors: list[QuantConvertError]) -> None:
    first: dict[str, str] = {}
    for ref in tensors:
        if ref.name in first:
            errors.append(
                CheckpointError(f"tensor `{ref.name}` exists twice: in `{first[ref.name]}` and in `{ref.file}`")
            )
        first.setdefault(ref.name, ref.file)
