"""What a source holds, as values: no I/O here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from quantconvert.checkpoint.header import TensorRef
from quantconvert.checkpoint.ranges import RangeReader, Version

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of the source repository: path relative to it with `/`, size in bytes, and what was known of it.

    sha256: of its content, where the Hub says it (large files alone), or the name under which its cache keeps them.
    """

    path: str
    nbytes: int
    version: Version | None = None
    sha256: str | None = None


class Download(NamedTuple):
    """How many bytes will come over the network, and the folder that they go to.

    only_ranges: they cannot come whole.
    """

    folder: Path
    nbytes: int
    only_ranges: bool = False


class Repo(Protocol):
    """Where a checkpoint's bytes come from: a folder or a Hub repository. Can be pickled, for other processes."""

    @property
    def location(self) -> str:
        """As the user named it."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository; None for a folder."""
        ...

    def files(self) -> tuple[RepoFile, ...]:
        """Every file, sorted by path."""
        ...

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes of the file from `offset` on."""
        ...

    def open(self, path: str) -> RangeReader:
        """The file as ranges of bytes; raises `CheckpointError` where there is none."""
        ...

    def prepare(self, paths: tuple[str, ...]) -> None:
        """Told before all of `paths` are read, so that what comes over a network comes at once and only once."""
        ...

    def download(self, paths: tuple[str, ...]) -> Download | None:
        """What `prepare` would write to a disk of this machine; None where it writes nothing."""
        ...

    def materialize(self, paths: tuple[str, ...]) -> Path:
        """A local folder in which all of `paths` exist whole, for a format that only another library can read."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A readable checkpoint: config, tensors in the order of their bytes, and the files around them."""

    location: str
    revision: str | None
    config: dict[str, Any] = field(repr=False)
    card: str | None = field(repr=False)
    tensors: tuple[TensorRef, ...] = field(repr=False)
    weight_files: tuple[RepoFile, ...]
    side_files: tuple[RepoFile, ...]
    dropped_files: tuple[RepoFile, ...]
    rewritten_files: tuple[RepoFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: `text_config` where a multimodal config has one."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def quantization_block(self) -> dict[str, Any] | None:
        """The `quantization_config` of config.json, wherever writers put it; None where there is none."""
        for config in (self.config, self.text_config):
            for key in QUANTIZATION_KEYS:
                if isinstance(config.get(key), dict):
                    block: dict[str, Any] = config[key]
                    is_named = "quant_method" in block or not {"bits", "group_size"} <= block.keys()
                    return block if is_named else block | {"quant_method": "mlx"}  # mlx-lm gives it no name
        return None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")
