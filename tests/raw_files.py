"""safetensors files written byte by byte, true or lying: without torch and without safetensors' own writer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from quantconvert.checkpoint.files import INDEX_NAME, SINGLE_NAME
from quantconvert.dtypes import nbytes_of
from tests.builders import LLAMA_CONFIG


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "BF16") -> dict[str, Any]:
    """One tensor of a header; by default a one-dimensional one that fills its bytes."""
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


def shard(path: Path, header: bytes | dict[str, Any], data: int = 0, length: int | None = None) -> None:
    """A file with exactly this header (and saying this length) and that many zero bytes, sparse."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw) if length is None else length) + raw)
        file.truncate(8 + len(raw) + data)


def write_headers(folder: Path, shards: Mapping[str, Sequence[tuple[str, str, tuple[int, ...]]]], config: Any) -> Path:
    """A checkpoint of which only headers and config take room: (name, dtype, shape) of tensors by file; an index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for file, tensors in shards.items():
        header: dict[str, Any] = {}
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + nbytes_of(dtype, prod(shape))
            header[name] = entry(begin, end, shape, dtype)
            weight_map[name] = file
        shard(folder / file, header, end)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_raw(folder: Path, header: bytes | dict[str, Any], data_nbytes: int = 0, length: int | None = None) -> Path:
    """A folder whose model.safetensors has exactly this header (and says this length) and that many zero bytes."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "intermediate_size"}  # any shape will do
    (folder / "config.json").write_text(json.dumps(config))
    shard(folder / SINGLE_NAME, header, data_nbytes, length)
    return folder
