"""What is asked of an observation, and everything that can be refused before the model is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import OutputError, QuantConvertError, UnsupportedError, UsageError

PACKAGES = ("transformers",)
INSTALL = "pip install 'quantconvert[engines]'"


@dataclass(frozen=True, slots=True)
class Request:
    """text: the file that the model reads; None where it writes its own (`self_written`). tokens: how many it sees.
    moments: whether E[x x^T] is stored too. seed: of the model's own text.
    """

    out: Path
    text: Path | None = None
    self_written: bool = False
    tokens: int = 16384
    moments: bool = False
    seed: int = 0
    overwrite: bool = False


def problems(asked: Request) -> Iterator[QuantConvertError]:
    """What stands against it, whatever the source is."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        yield UsageError(f"observe runs the model by {', '.join(missing)}, which is not installed", hint=INSTALL)
    if asked.text is None and not asked.self_written:
        yield UsageError(
            "observe needs text that the model reads",
            hint="--text FILE (of the kind that the model is used for), or --self: it writes its own",
        )
    if asked.text is not None and asked.self_written:
        yield UsageError("--text contradicts --self", hint="give one of them")
    if asked.text is not None and not asked.text.is_file():
        yield UsageError(f"--text: `{asked.text}` is no file")
    yield from _place_problems(asked)


def _place_problems(asked: Request) -> Iterator[OutputError]:
    out = asked.out
    if out.is_dir():
        yield OutputError(f"`{out}` is a folder: expected a file to write, such as `stats.safetensors`")
    elif os.path.lexists(out) and not asked.overwrite:
        yield OutputError(f"`{out}` exists", hint="--overwrite replaces it")
    elif not out.absolute().parent.is_dir():
        yield OutputError(f"there is no folder `{out.absolute().parent}` to write `{out.name}` in")


def source_problems(checkpoint: Checkpoint) -> Iterator[QuantConvertError]:
    """What transformers could not run on a CPU, or not without running code of the source."""
    if checkpoint.quantization_block is not None:
        yield UnsupportedError(
            f"`{checkpoint.location}` is quantized: observe runs plain models",
            hint="quantconvert dequantize SRC PLAIN first, and observe that",
        )


def text_sha256(path: Path) -> str:
    """sha256 of a file of text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
