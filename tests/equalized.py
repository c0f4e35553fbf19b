"""A checkpoint with loud columns, and what is done to files of factors."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.factors import FACTORS, read_places
from quantconvert.verification.report import report_bytes
from tests.builders import llama_tensors

OPTIONS: dict[str, Any] = {"equalize": True, "group_size": 32, "max_shard_size": "60KB"}
NORM, Q, V, OUT = (
    f"model.layers.0.{name}.weight"
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
)


def loud(**more: Any) -> dict[str, Tensor]:
    """A Llama some of whose columns are up to thirty times as large as others, with gains around one."""
    tensors = llama_tensors(**more)
    for i, (name, tensor) in enumerate(tensors.items()):
        spread = torch.exp(torch.randn(tensor.shape[-1], generator=torch.Generator().manual_seed(i)))
        scaled = tensor.float() * spread if tensor.ndim == 2 else 1 + tensor.float() * 5
        tensors[name] = scaled.to(tensor.dtype)
    return tensors


def factors_of(out: Path) -> dict[str, Tensor]:
    content = (out / FACTORS).read_bytes()
    return {
        name: torch.frombuffer(bytearray(content[ref.offset : ref.offset + ref.nbytes]), dtype=torch.float32)
        for name, ref in read_places(out).items()
    }


def copied(result: Path, out: Path) -> Path:
    out.mkdir()
    for path in result.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def flip(out: Path, offset: int, file: str = FACTORS) -> None:
    content = bytearray((out / file).read_bytes())
    content[offset] ^= 0x40
    (out / file).write_bytes(content)


def repair(out: Path) -> None:
    """Checksums that agree with the files again."""
    content = (out / FACTORS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    old = json.loads(content[8 : 8 + size])["__metadata__"]["sha256"]
    (out / FACTORS).write_bytes(content.replace(old.encode(), hashlib.sha256(content[8 + size :]).hexdigest().encode()))
    report = json.loads((out / "quantconvert.json").read_text())
    del report["sha256"]
    report["files"] = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in report["files"]}
    (out / "quantconvert.json").write_bytes(report_bytes(report))


def vectors(widths: dict[str, int]) -> bytes:
    """A file of ones that vouches for itself."""
    entries: dict[str, object] = {}
    body = b""
    for name, width in widths.items():
        offsets = [len(body), len(body) + 4 * width]
        entries[name] = {"dtype": "F32", "shape": [width], "data_offsets": offsets}
        body += struct.pack("<f", 1.0) * width
    header = json.dumps({"__metadata__": {"sha256": hashlib.sha256(body).hexdigest()}} | entries).encode()
    return struct.pack("<Q", len(header)) + header + body
