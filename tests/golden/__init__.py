"""Bytes that other packages' own packers made from known codes: `make.py` writes them, `load` reads them.

A file is {"package", "version", "codes": {name: tensor}, "cases": [case]}. A case holds `name`, `scheme` (the fields of
`quantconvert.schemes.Scheme`), `codes` (a name in the file's `codes`: uint8 [O, I], 0 .. 2^b - 1), `scale` [O, G],
`zero_point` (uint8 [O, G], null when symmetric) and `tensors`, which the peer would write for one module, by suffix.
Tensors are stored as {"dtype", "shape", "base64"}, little-endian.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
FILES = ("compressed_tensors", "gptq", "awq")


def to_json(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.flatten().clone().view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "base64": base64.b64encode(raw).decode()}


def from_json(value: dict[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(value["base64"]))
    return torch.frombuffer(raw, dtype=getattr(torch, value["dtype"])).view(value["shape"])


def load(name: str) -> dict[str, Any]:
    """One file with its tensors read, and in each case the codes themselves."""
    document = json.loads((FOLDER / f"{name}.json").read_text())
    for case in document["cases"]:
        case["codes"] = from_json(document["codes"][case["codes"]])
        case["scale"] = from_json(case["scale"])
        case["zero_point"] = case["zero_point"] and from_json(case["zero_point"])
        case["tensors"] = {suffix: from_json(value) for suffix, value in case["tensors"].items()}
    return document
