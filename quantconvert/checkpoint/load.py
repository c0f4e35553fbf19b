"""From a repository's files to a `Checkpoint`: config, index and headers, with all problems reported together."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from operator import itemgetter
from typing import Any

from quantconvert.checkpoint.config import MAX_CONFIG_NBYTES, check_config
from quantconvert.checkpoint.contents import Checkpoint, Repo, RepoFile
from quantconvert.checkpoint.files import (
    INDEX_NAME,
    MAX_REPORTED,
    SINGLE_NAME,
    STATE_FOLDER,
    TORCH_INDEX_NAME,
    TORCH_NAME,
    check_files,
    is_pipeline,
    kind_of,
)  # fmt: skip
from quantconvert.checkpoint.header import TensorRef, header_text, parse_header, parse_object
from quantconvert.checkpoint.local import LocalFolder
from quantconvert.checkpoint.sniff import SNIFFED_NBYTES, check_kind
from quantconvert.checkpoint.torch_file import read_torch_file
from quantconvert.errors import CheckpointError, QuantConvertError, raise_all
from quantconvert.text import is_plain, quoted

# Twice what the largest public checkpoint holds (Kimi-K2-Thinking: 208,000 tensors); a plan takes 3.4 kB for each.
MAX_TENSORS = 500_000
MAX_HEADERS_NBYTES = 100_000_000
MAX_INDEX_NBYTES = 50_000_000
MAX_JSON_VALUES = 1_100_000  # two for each tensor of an index
_PART = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.safetensors$")


def load_checkpoint(repo: Repo) -> Checkpoint:
    """Read config.json, the index and every header of `repo`; no tensor data.

    Raises `CheckpointError`, or a `Refusal` with all of them, when something is missing or malformed.
    """
    files = check_files(repo.files(), repo.location)
    if not files:
        if isinstance(repo, LocalFolder) and (repo.path / STATE_FOLDER).is_dir():
            raise CheckpointError(
                f"`{repo.location}` holds nothing but a conversion that was interrupted",
                hint="the command that began it continues it",
            )
        raise CheckpointError(f"source `{repo.location}` is an empty folder")
    if is_pipeline(files.values()):
        raise CheckpointError(
            f"`{repo.location}` is a pipeline, no checkpoint",
            hint="`quantconvert convert` takes it whole, --subfolder NAME one of its folders",
        )
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
    return parse_object(repo.read(file.path, 0, file.nbytes), f"`{file.path}`", max_values=MAX_JSON_VALUES)


def _read_config(repo: Repo, files: dict[str, RepoFile], errors: list[QuantConvertError]) -> dict[str, Any]:
    if "config.json" not in files:
        inside = sorted({path.split("/")[0] for path in files if path.endswith("/config.json")})
        hint = f"one sub-folder has its own: try `{repo.location}/{inside[0]}`" if inside else None
        errors.append(CheckpointError(f"no config.json in `{repo.location}`", hint=hint))
        return {}
    try:
        config = _read_json(repo, files["config.json"], MAX_CONFIG_NBYTES)
        check_config(config, "config.json")
        return config
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
            weight_map = _read_json(repo, files[index], MAX_INDEX_NBYTES).get("weight_map")
        except CheckpointError as error:
            errors.append(error)
            return None, []
        if not isinstance(weight_map, dict) or set(map(type, weight_map.values())) - {str}:
            errors.append(CheckpointError(f"`{index}` has no weight_map from tensor names to file names"))
            return None, []
        counts = Counter(weight_map.values())
        errors += islice(_index_problems(index, counts, files), MAX_REPORTED)
        return weight_map, sorted(name for name in counts if name in files and name.endswith(_suffix(index)))
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


def _suffix(index: str) -> str:
    return ".bin" if index == TORCH_INDEX_NAME else ".safetensors"


def _index_problems(index: str, counts: Counter[str], files: dict[str, RepoFile]) -> Iterator[CheckpointError]:
    for name in sorted(counts):
        if "/" in name or "\\" in name or name.startswith(".") or not is_plain(name):
            yield CheckpointError(f"`{index}` names {quoted(name)}: expected a file beside it")
        elif name not in files:
            yield CheckpointError(
                f"{quoted(name)} is missing: `{index}` says that it holds {counts[name]} tensors",
                hint="download the missing file; every file named in the index must be there",
            )
        elif not name.endswith(_suffix(index)):
            yield CheckpointError(f"`{index}` names `{name}`: expected a *{_suffix(index)} file")


def _kind(files: dict[str, RepoFile]) -> tuple[str, str]:
    """The names of the index and of a single file: safetensors where there are any, else torch's own."""
    if any(path.endswith(".safetensors") and "/" not in path for path in files) or INDEX_NAME in files:
        return INDEX_NAME, SINGLE_NAME
    return (TORCH_INDEX_NAME, TORCH_NAME) if {TORCH_INDEX_NAME, TORCH_NAME} & set(files) else (INDEX_NAME, SINGLE_NAME)


# A header's text, the tensors of a file that torch reads, or what is wrong with it.
_Found = bytes | list[TensorRef] | CheckpointError


def _read_headers(repo: Repo, files: list[RepoFile], errors: list[QuantConvertError]) -> list[TensorRef]:
    """All headers are fetched, and counted, before the first is parsed: together they must not be too many."""

    def fetch(file: RepoFile) -> _Found:
        """The header of a file as bytes, the tensors of a pickle, or what is wrong."""
        try:
            check_kind(repo.read(file.path, 0, min(file.nbytes, SNIFFED_NBYTES)), file.path, file.nbytes)
            if file.path.endswith(".bin"):  # torch reads those from the disk
                return read_torch_file(repo.materialize((file.path,)) / file.path, file.path)
            return header_text(lambda offset, n: repo.read(file.path, offset, n), file.path, file.nbytes)
        except CheckpointError as error:
            return error

    if repo.revision and len(files) > 1:
        with ThreadPoolExecutor(8) as pool:
            texts = _counted(pool.map(fetch, files), repo.location, errors)
    else:
        texts = _counted(map(fetch, files), repo.location, errors)
    tensors: list[TensorRef] = []
    most = len(errors) + MAX_REPORTED
    for file in files if len(texts) == len(files) else ():
        text = texts.popleft()
        if len(errors) == most:
            break
        try:
            if isinstance(text, CheckpointError):
                raise text
            tensors += parse_header(text, file.path, file.nbytes) if isinstance(text, bytes) else text
        except CheckpointError as error:
            errors.append(error)
    return tensors


def _counted(texts: Iterable[_Found], location: str, errors: list[QuantConvertError]) -> deque[_Found]:
    """The headers as long as they are few and short enough to be parsed in bounded memory."""
    kept: deque[_Found] = deque()
    nbytes = count = 0
    for text in texts:
        if isinstance(text, bytes):
            nbytes, count = nbytes + len(text), count + text.count(b'"data_offsets"')
        elif not isinstance(text, CheckpointError):
            count += len(text)
        if count > MAX_TENSORS:
            errors.append(CheckpointError(f"`{location}` has too many tensors: expected at most {MAX_TENSORS}"))
            break
        if nbytes > MAX_HEADERS_NBYTES:
            message = f"headers of `{location}` are too large: expected at most {MAX_HEADERS_NBYTES} bytes in all"
            errors.append(CheckpointError(message))
            break
        kept.append(text)
    return kept


def _check_index(weight_map: dict[str, str] | None, tensors: list[TensorRef], errors: list[QuantConvertError]) -> None:
    """Every tensor that the index promises must be in its file; asked only when all headers could be read.

    A tensor that the index does not name is taken all the same: engines read whole files.
    """
    if weight_map is None or errors:
        return
    if weight_map == dict(map(itemgetter(0, 3), tensors)):  # as nearly always
        return
    at = {(ref.name, ref.file) for ref in tensors}
    absent = ((name, file) for name, file in weight_map.items() if (name, file) not in at)
    for name, file in islice(absent, MAX_REPORTED):
        index = TORCH_INDEX_NAME if file.endswith(".bin") else INDEX_NAME
        message = f"tensor {quoted(name)} is not in `{file}`, where `{index}` puts it"
        errors.append(CheckpointError(message))


def _check_duplicates(tensors: list[TensorRef], errors: list[QuantConvertError]) -> None:
    if len({ref.name for ref in tensors}) == len(tensors):
        return
    first: dict[str, str] = {}
    twice: list[tuple[TensorRef, str]] = []
    for ref in tensors:
        if first.setdefault(ref.name, ref.file) != ref.file:
            twice.append((ref, first[ref.name]))
    for ref, file in twice[:MAX_REPORTED]:
        errors.append(CheckpointError(f"tensor `{ref.name}` exists twice: in `{file}` and in `{ref.file}`"))
