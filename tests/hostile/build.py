"""Raw files for hostile checkpoints: written byte by byte, without torch and without safetensors' own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.raw_files import entry, shard

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.mlp.down_proj.weight"
NBYTES = 128 * 128 * 2


GOOD = {LAYER: entry(0, NBYTES, [128, 128])}
EMBEDDINGS = {"model.embed_tokens.weight": entry(NBYTES, NBYTES + 8 * 256, [8, 128])}
WHOLE_NBYTES = NBYTES + 8 * 256


def good(folder: Path) -> Path:
    """A checkpoint that converts: embeddings, one weight, a config, a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    shard(folder / SINGLE, GOOD | EMBEDDINGS, WHOLE_NBYTES)
    return folder


def indexed(folder: Path, weight_map: object) -> None:
    """Two shards beside each other, and an index that says this."""
    (folder / SINGLE).rename(folder / "one.safetensors")
    shard(folder / "two.safetensors", {"b": entry(0, 2)}, 2)
    text = weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / INDEX).write_text(text)


def link(folder: Path, name: str, target: str | Path) -> None:
    """`name` becomes a link."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def empty_tensors(count: int, start: int = 0) -> bytes:
    """A header of `count` tensors without elements, each in as few bytes as it can have."""
    one = '"a%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(one % i for i in range(start, start + count)) + "}").encode()


@dataclass(frozen=True)
class Case:
    """`spoil` changes a good checkpoint in place; then `plan` with `options` must refuse it and say `says`."""

    name: str
    spoil: Callable[[Path], object]
    says: str
    kind: str = "CheckpointError"
    options: dict[str, Any] = field(default_factory=dict)
