"""`pytorch_model.bin`: where each tensor lies in a torch file, without trusting the file.

Read by torch's weights-only loader, memory-mapped and without data (fake tensors, which know their place in the
file: torch `serialization.py`, `_checkpoint_offset`); the bytes themselves are read like those of any other file.
A file from before torch 1.6 cannot be mapped, and one that holds anything but tensors is not a checkpoint of weights:
both are refused. No pickle of the file is executed by us.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

from quantconvert.checkpoint.header import TensorRef
from quantconvert.dtypes import DTYPES
from quantconvert.errors import CheckpointError

MAX_PICKLE_NBYTES = 200_000_000
_CONVERT = "load it with torch where you trust it, and save it again as safetensors"


def read_torch_file(path: Path, file: str) -> list[TensorRef]:
    """The tensors of one torch file, in the order of their bytes; `file` is the name in refs and errors.

    Raises `CheckpointError` for anything but a dictionary of contiguous tensors stored without compression.
    """
    _check_archive(path, file)
    found = _load(path, file)
    if not isinstance(found, dict):
        raise CheckpointError(f"`{file}` holds a {type(found).__name__}: expected a dictionary of tensors")
    nbytes = path.stat().st_size
    refs = [_ref(name, value, file, nbytes) for name, value in found.items()]
    return sorted(refs, key=lambda ref: ref.offset)


def _check_archive(path: Path, file: str) -> None:
    """A torch file is a zip archive of stored entries; the pickle in it must have a reasonable size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            orders = [archive.read(e) for e in entries if e.filename.endswith("byteorder") and e.file_size <= 16]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise CheckpointError(
            f"`{file}` cannot be memory-mapped as a torch file ({error}): damaged, or older than torch 1.6",
            hint=_CONVERT,
        ) from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"`{file}` is compressed: expected a torch file as torch.save writes it")
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE_NBYTES:
            raise CheckpointError(
                f"`{file}` has a table of {entry.file_size} bytes: expected at most {MAX_PICKLE_NBYTES}"
            )
    # torch 2.13 would swap the bytes of tensors without data, which ends the process.
    names = [entry for entry in entries if entry.filename.endswith("byteorder")]
    if len(orders) < len(names) or any(order != sys.byteorder.encode() for order in orders):
        raise CheckpointError(f"`{file}` has a byte order other than {sys.byteorder} endian, this machine's")


def _load(path: Path, file: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return torch.load(path, weights_only=True, mmap=True)
    except Exception as error:  # whatever a malformed or hostile file makes the loader raise
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        reason = reason.strip() or str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"`{file}` holds more than weights, or is damaged: torch's weights-only loader refuses it: {reason[:300]}",
            hint=_CONVERT,
        ) from None


def _ref(name: object, value: Any, file: str, file_nbytes: int) -> TensorRef:
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise CheckpointError(
            f"`{file}` holds `{name}`, a {kind}: expected tensors by name and nothing else", hint=_CONVERT
        )
    tag = next((row.tag for row in DTYPES.values() if row.torch_name == str(value.dtype).removeprefix("torch.")), None)
    where = f"tensor `{name}` in `{file}`"
    if tag is None or value.layout != torch.strided:
        raise CheckpointError(f"{where}: expected a dense tensor of a known dtype, got {value.dtype} {value.layout}")
    if not value.is_contiguous():
        raise CheckpointError(
            f"{where} is a view with strides {list(value.stride())}: expected it contiguous", hint=_CONVERT
        )
    size = value.element_size()
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    offset, nbytes = int(start or 0) + value.storage_offset() * size, value.numel() * size
    if start is None or offset < 0 or offset + nbytes > file_nbytes:
        raise CheckpointError(f"{where}: its {nbytes} bytes at {offset} lie outside the file of {file_nbytes}")
    return TensorRef(name, tag, tuple(value.shape), file, int(offset), int(nbytes))
