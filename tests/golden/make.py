"""Write the golden files of this folder with the peers' own packers; needs compressed-tensors and GPTQModel.

    .venv-gptqmodel/bin/python -m tests.golden.make      (see tests/engines/install_gptqmodel.sh)

Scales have 8 significant bits and codes at most 8, so that `(code - zero) * scale` is exact in float32 and packers that
take weights find the very codes again. Nothing of quantconvert is used here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tests.golden import FOLDER, to_json

ROWS, COLUMNS, GROUP = 32, 64, 32
RAGGED = (13, 37)


def scheme(bits: int, symmetric: bool, strategy: str, activations: bool = False) -> dict[str, Any]:
    size = GROUP if strategy == "group" else None
    return {
        "num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": size, "activations": activations,
    }  # fmt: skip


def random_codes(bits: int, shape: tuple[int, int]) -> Tensor:
    """Every code occurs, in no order."""
    count = shape[0] * shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(bits))
    return (order % 2**bits).to(torch.uint8).view(shape)


def new_case(fields: dict[str, Any], shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of one case: scales 2^-12 .. 2^-5 with 8 significant bits; zero points over their whole range."""
    generator = torch.Generator().manual_seed(fields["num_bits"] + shape[0])
    groups = {"tensor": (1, 1), "channel": (shape[0], 1), "group": (shape[0], shape[1] // GROUP)}[fields["strategy"]]
    significand = torch.randint(128, 256, groups, generator=generator).float()
    exponent = torch.randint(-19, -12, groups, generator=generator).float()
    top = 2 ** fields["num_bits"]
    zero_point = torch.randint(0, top, groups, generator=generator).to(torch.uint8)
    if groups[0] > 1:
        zero_point[0], zero_point[1], zero_point[-1] = 0, top - 1, top - 1
    kind = "symmetric" if fields["symmetric"] else "asymmetric"
    ragged = f" {shape[0]}x{shape[1]}" if shape == RAGGED else ""
    activations = " W8A8" if fields["activations"] else ""
    return {
        "name": f"int{fields['num_bits']} {fields['strategy']} {kind}{activations}{ragged}",
        "scheme": fields,
        "codes": random_codes(fields["num_bits"], shape),
        "scale": (significand * 2.0**exponent).to(scale_dtype),
        "zero_point": None if fields["symmetric"] else zero_point,
    }


def explicit_zero(case: dict[str, Any]) -> Tensor:
    """The zero points [O, G] as numbers, also of a symmetric case."""
    if case["zero_point"] is not None:
        return case["zero_point"].int()
    return torch.full(case["scale"].shape, 2 ** (case["scheme"]["num_bits"] - 1), dtype=torch.int32)


def weight_of(case: dict[str, Any]) -> Tensor:
    """The weight that the codes stand for, exact in float32."""
    scale, zero = case["scale"].float(), explicit_zero(case)
    width = case["codes"].shape[1] // scale.shape[1]
    return (case["codes"].int() - zero.repeat_interleave(width, 1)).float() * scale.repeat_interleave(width, 1)


def linear_of(case: dict[str, Any]) -> torch.nn.Linear:
    rows, columns = case["codes"].shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight_of(case)
    return linear


def pack_compressed_tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """What compressed-tensors' compressor (`pack_to_int32`) makes of the float32 weight, scale and zero point."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    fields = dict(case["scheme"])
    activations = QuantizationArgs(num_bits=8, dynamic=True, strategy="token") if fields.pop("activations") else None
    whole = fields["strategy"] == "tensor"
    state = {"weight": weight_of(case), "weight_scale": case["scale"].reshape(1) if whole else case["scale"]}
    if case["zero_point"] is not None:
        signed = (case["zero_point"].int() - 2 ** (fields["num_bits"] - 1)).to(torch.int8)
        state["weight_zero_point"] = signed.reshape(1) if whole else signed
    asked = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**fields, type="int"), input_activations=activations
    )
    name = "int-quantized" if activations else "pack-quantized"
    return BaseCompressor.get_value_from_registry(name).compress(state, asked)


def pack_gptq(case: dict[str, Any]) -> dict[str, Tensor]:
    """GPTQModel's `TorchLinear.pack_block`; symmetric weights then go through its conversion to v1 (zeros minus 1)."""
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # or it compiles a packer in C++
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    fields = case["scheme"]
    rows, columns = case["codes"].shape
    size = fields["group_size"] or columns
    layer = TorchLinear(
        bits=fields["num_bits"], group_size=size, sym=fields["symmetric"], desc_act=False, in_features=columns,
        out_features=rows, format=FORMAT.GPTQ if fields["symmetric"] else FORMAT.GPTQ_V2,
    )  # fmt: skip
    g_idx = torch.arange(columns, dtype=torch.int32) // size
    layer.pack_block(linear_of(case), case["scale"].float(), explicit_zero(case), g_idx)
    if fields["symmetric"]:
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=fields["num_bits"], offload_to_disk=False))
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def pack_awq(case: dict[str, Any]) -> dict[str, Tensor]:
    """GPTQModel's `AwqTorchLinear.pack` (GEMM layout; the class that needs no GPU); scales are stored as float16."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    fields = case["scheme"]
    rows, columns = case["codes"].shape
    layer = AwqTorchLinear(
        bits=4, group_size=fields["group_size"] or columns, sym=fields["symmetric"], desc_act=False,
        in_features=columns, out_features=rows,
    )  # fmt: skip
    layer.pack(linear_of(case), case["scale"].float(), explicit_zero(case))
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}


Packer = Callable[[dict[str, Any]], dict[str, Tensor]]
PACKERS: dict[str, tuple[str, Packer]] = {
    "compressed_tensors": ("compressed-tensors", pack_compressed_tensors),
    "gptq": ("gptqmodel", pack_gptq),
    "awq": ("gptqmodel", pack_awq),
}


def cases(name: str) -> list[dict[str, Any]]:
    """The inputs that each file holds."""
    whole = (ROWS, COLUMNS)
    if name == "awq":
        asked = [(scheme(4, s, width), whole) for s in (True, False) for width in ("group", "channel")]
    else:
        widths = ("group", "channel") if name == "gptq" else ("group", "channel", "tensor")
        asked = [(scheme(b, s, width), whole) for b in (4, 8) for s in (True, False) for width in widths]
    if name == "compressed_tensors":
        asked += [(scheme(8, True, width, activations=True), whole) for width in ("channel", "tensor")]
        asked += [(scheme(b, False, "channel"), RAGGED) for b in (4, 8)]
    dtype = torch.bfloat16 if name == "compressed_tensors" else torch.float16
    return [new_case(fields, shape, dtype) for fields, shape in asked]


def document(name: str) -> dict[str, Any]:
    package, pack = PACKERS[name]
    codes: dict[str, Any] = {}
    written = []
    for case in cases(name):
        shape = "x".join(map(str, case["codes"].shape))
        key = f"int{case['scheme']['num_bits']} {shape}"
        codes[key] = to_json(case["codes"])
        zero_point = case["zero_point"]
        written.append(
            {
                **case,
                "codes": key,
                "scale": to_json(case["scale"]),
                "zero_point": None if zero_point is None else to_json(zero_point),
                "tensors": {suffix: to_json(tensor) for suffix, tensor in sorted(pack(case).items())},
            }
        )
    return {"package": package, "version": version(package), "codes": codes, "cases": written}


if __name__ == "__main__":
    for file in PACKERS:
        (FOLDER / f"{file}.json").write_text(json.dumps(document(file), indent=1) + "\n")
