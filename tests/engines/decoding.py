"""Every quantized weight of a converted folder, whatever the mix of schemes and layouts.

Bits come from the tensors' shapes and not from the config, so that a wrong config cannot hide: `qweight` has I*b/32
words for the I of `g_idx` (without that it is AWQ's int4), `weight_packed` has them for the I of `weight_shape`, and an
int8 `weight` is W8A8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.builders import decode_awq, decode_compressed_tensors, decode_gptq, decode_rtn, read_tensors


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def decode_all(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Module name to weight [O, I], by the independent decoders.

    dtype: what scales are cast to first, hence the dtype of the products; the stored one unless given.
    """
    v1 = quantization_config(folder).get("checkpoint_format") == "gptq"
    tensors = read_tensors(folder)
    for name in [name for name in tensors if dtype and name.endswith(("scale", "scales"))]:
        tensors[name] = tensors[name].to(dtype)
    found = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight" and f"{module}.g_idx" not in tensors:
            found[module] = decode_awq(tensors, module)
        elif suffix == "qweight":
            bits = tensor.shape[0] * 32 // tensors[f"{module}.g_idx"].shape[0]
            found[module] = decode_gptq(tensors, module, bits, v1)
        elif suffix == "weight_packed":
            bits = tensor.shape[1] * 32 // int(tensors[f"{module}.weight_shape"][1])
            found[module] = decode_compressed_tensors(tensors, module, bits)
        elif suffix == "weight" and tensor.dtype == torch.int8:
            found[module] = decode_rtn(tensors, module, 8)
    return found
