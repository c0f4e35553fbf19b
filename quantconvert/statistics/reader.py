"""One file of statistics: which tensors it holds, and for which modules.

It is a safetensors file. For each input x of linear layers, under the name of the first module that reads it,
    <module>.second_moment  F32 [I]     E[x_j^2]
    <module>.channel_max    F32 [I]     max |x_j|
    <module>.max            F32 [1]     max |x|
    <module>.moments        F32 [I, I]  E[x x^T], only with `observe --moments`
over all tokens that were seen. Its `__metadata__` says what they are of: `quantconvert_version`, `model_type`,
`num_tokens`, `fingerprint` (of the weights: `fit.fingerprint`), `text_sha256` or `self`, `seed`, `data_sha256` (of all
bytes after the header), `inputs` (JSON: each module, as the checkpoint names it, to the module whose name the tensors
bear) and `unobserved` (JSON: kinds of linear layers without statistics).
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from quantconvert.checkpoint import TensorRef
from quantconvert.checkpoint.header import header_text, metadata_of, parse_header
from quantconvert.checkpoint.ranges import LocalReader, Version
from quantconvert.errors import CheckpointError

KINDS = ("second_moment", "channel_max", "max", "moments")
OBSERVE = "quantconvert observe SRC STATS.safetensors --text FILE (or --self)"
HINT = f"{OBSERVE} writes one"


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics in a file. digest: sha256 of its header, which names the sha256 of its data; version: what the
    file was when it was opened. inputs: the module whose name the tensors bear, for each module that was observed.
    """

    path: Path
    digest: str
    version: Version
    model_type: str
    num_tokens: int
    fingerprint: str | None
    inputs: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, TensorRef] = field(repr=False)

    def second_moment(self, module: str) -> TensorRef | None:
        """E[x_j^2] of a module's input, F32 [I]; None where it was not observed."""
        return self._find(module, "second_moment")

    def channel_max(self, module: str) -> TensorRef | None:
        """max |x_j| of a module's input, F32 [I]; None where it was not observed."""
        return self._find(module, "channel_max")

    def max(self, module: str) -> TensorRef | None:
        """max |x| of a module's input, F32 [1]; None where it was not observed."""
        return self._find(module, "max")

    def moments(self, module: str) -> TensorRef | None:
        """E[x x^T] of a module's input, F32 [I, I]; None where it was not observed, or without them."""
        return self._find(module, "moments")

    def _find(self, module: str, kind: str) -> TensorRef | None:
        key = self.inputs.get(module)
        return None if key is None else self.tensors.get(f"{key}.{kind}")

    def to_json(self) -> dict[str, object]:
        """What reports say of it: no folder of this machine."""
        return {"file": self.path.name, "header_sha256": self.digest, "num_tokens": self.num_tokens}

    def open(self) -> LocalReader:
        """The file, for its bytes; raises `CheckpointError` where it is no longer the one that was opened."""
        reader = LocalReader(self.path, self.path.name)
        if not reader.version().matches(self.version):
            reader.close()
            raise CheckpointError(f"statistics `{self.path}` changed after they were opened")
        return reader

    def values(self, ref: TensorRef) -> array[float]:
        """The numbers of one tensor; raises `CheckpointError` where one is NaN, infinite or, but for moments, negative.

        For vectors: moments are large, and belong to those who have torch.
        """
        reader = self.open()
        try:
            return _values(reader, ref)
        finally:
            reader.close()


def open_statistics(path: Path) -> Statistics:
    """The statistics in a file; raises `CheckpointError` for what is none, with the command that writes one.

    Reads the header, and every vector to see that its numbers can be what they are called.
    """
    try:
        reader = LocalReader(path, path.name)
    except CheckpointError as error:
        raise CheckpointError(f"--statistics: {error.message.replace(' of the source', '')}", hint=HINT) from error
    try:
        version = reader.version()
        text = _header(reader, path, version.nbytes)
        refs = {ref.name: ref for ref in parse_header(text, path.name, version.nbytes)}
        metadata = metadata_of(text, path.name)
        found = _statistics(path, version, hashlib.sha256(text).hexdigest(), refs, metadata)
        for ref in refs.values():
            if len(ref.shape) == 1:
                _values(reader, ref)
        return found
    finally:
        reader.close()


def _header(reader: LocalReader, path: Path, nbytes: int) -> bytes:
    try:
        return header_text(partial(_read, reader), path.name, nbytes)
    except CheckpointError as error:
        raise CheckpointError(f"--statistics `{path}` is no file of statistics: {error.message}", hint=HINT) from error


def _statistics(
    path: Path, version: Version, digest: str, refs: Mapping[str, TensorRef], metadata: Mapping[str, str]
) -> Statistics:
    try:
        inputs, num_tokens = json.loads(metadata["inputs"]), int(metadata["num_tokens"])
        model_type = metadata["model_type"]
    except (KeyError, ValueError, RecursionError):
        inputs = None
    if not isinstance(inputs, dict) or not all(type(key) is str for key in inputs.values()):
        raise CheckpointError(f"`{path}` holds no statistics: its metadata do not say whose inputs they are", hint=HINT)
    for module, key in inputs.items():
        missing = [kind for kind in KINDS[:3] if f"{key}.{kind}" not in refs]
        if missing:
            raise CheckpointError(f"`{path}`: `{key}.{missing[0]}` is missing, the input of `{module}`")
    for ref in refs.values():
        _check_shape(path, ref, refs)
    return Statistics(path, digest, version, model_type, num_tokens, metadata.get("fingerprint"), inputs, refs)


def _check_shape(path: Path, ref: TensorRef, refs: Mapping[str, TensorRef]) -> None:
    """A known kind, of float32, as wide as the others of its input."""
    key, _, kind = ref.name.rpartition(".")
    partner = refs.get(f"{key}.second_moment")
    width = partner.shape[0] if partner is not None and len(partner.shape) == 1 else 0
    expected = {"second_moment": (width,), "channel_max": (width,), "max": (1,), "moments": (width, width)}.get(kind)
    if ref.dtype != "F32" or ref.shape != expected or not width:
        wanted = f"F32 {list(expected)}" if expected and width else f"one of {', '.join(KINDS)} beside a second_moment"
        raise CheckpointError(f"`{ref.name}` in `{path}`: expected {wanted}, got {ref.dtype} {list(ref.shape)}")


def _values(reader: LocalReader, ref: TensorRef) -> array[float]:
    values = array("f", bytes(ref.nbytes))
    reader.read_into(memoryview(values).cast("B"), ref.offset)
    total = sum(values)  # of float32 in float64: finite if all of them are
    if not math.isfinite(total) or (len(ref.shape) == 1 and min(values) < 0):
        raise CheckpointError(f"`{ref.name}` in `{reader.name}`: expected finite numbers of at least 0")
    return values


def _read(reader: LocalReader, offset: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    reader.read_into(memoryview(data), offset)
    return bytes(data)
