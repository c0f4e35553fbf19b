"""Small checkpoints made by the peers themselves, and the weights that their own libraries read back from them.

Functions import their library when called: compressed-tensors and GPTQModel live in different environments.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.builders import read_tensors
from tests.engines import moe
from tests.engines.common import EXAMPLES

LINEARS = 14  # seven in each of two layers
GROUP = 32


def llama(folder: Path, one_sided: bool = True) -> Path:
    """A random Llama. one_sided: rows of one sign among the others, whose zero points are the lowest and the highest
    code (nothing else makes an asymmetric zero point 0, which GPTQ v1 stores as -1).
    """
    import transformers

    def build() -> Any:
        common = {key: value for key, value in moe.COMMON.items() if key != "num_experts_per_tok"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, intermediate_size=256))
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear) and one_sided:
                module.weight.data[0::7].abs_().add_(0.01)
                module.weight.data[1::7].abs_().add_(0.01).neg_()
        return model

    return moe.save(build, folder)


def by_compressed_tensors(
    source: Path,
    folder: Path,
    weights: dict[str, Any],
    activations: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    forced_format: str | None = None,
) -> dict[str, Tensor]:
    """Compress the linears of `source` with `ModelCompressor` and min-max scales; what it decompresses, in bfloat16.

    attention: another scheme's `weights` and `activations`, for `self_attn`.
    """
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    groups = {"group_0": _scheme("Linear", weights, activations)}
    if attention:
        groups["group_1"] = _scheme("re:.*self_attn.*", **attention)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    for module in quantized.values():
        _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model, forced_format)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {name: module.weight.data for name, module in quantized.items()}


def _scheme(target: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    inputs = QuantizationArgs(type="int", **activations) if activations else None
    return QuantizationScheme(
        targets=[target], weights=QuantizationArgs(type="int", **weights), input_activations=inputs
    )


def _calibrate(module: Any) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams

    w, args = module.weight.data, module.quantization_scheme.weights
    if args.strategy == "tensor":
        low, high = w.min().view(1), w.max().view(1)
    else:
        groups = w.view(len(w), -1, args.group_size or w.shape[1])
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low, high, args)
    module.weight_scale.data.copy_(scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero_point)
    if hasattr(module, "input_scale"):  # static activations: any calibrated number
        module.input_scale.data.fill_(0.1)


def calibration_rows() -> list[dict[str, list[int]]]:
    """Tokens of the held-out text (a token is a byte): enough for a Hessian of this width."""
    text = (EXAMPLES / "heldout.txt").read_bytes()
    return [{"input_ids": list(text[i : i + 64]), "attention_mask": [1] * 64} for i in range(0, 16 * 64, 64)]


def by_gptqmodel(source: Path, folder: Path, kind: str, **options: Any) -> dict[str, Tensor]:
    """Quantize and save with GPTQModel; the weights [O, I] that it dequantizes after loading them again, in float16.

    kind: `rtn` (weight-only, no data), `gptq` or `awq` (both with a few calibration rows).
    """
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # or it compiles a packer in C++
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.config import AWQConfig, RTNConfig

    made = {"rtn": RTNConfig, "gptq": QuantizeConfig, "awq": AWQConfig}[kind](offload_to_disk=False, **options)
    model = GPTQModel.load(str(source), made, device="cpu")
    model.quantize(None if kind == "rtn" else calibration_rows(), **({} if kind == "rtn" else {"batch_size": 1}))
    model.save(str(folder))
    return _awq_weights(folder) if kind == "awq" else _gptq_weights(folder)


def _gptq_weights(folder: Path) -> dict[str, Tensor]:
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.eval()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    return {name: layer.dequantize_weight().t() for name, layer in layers.items()}


def _awq_weights(folder: Path) -> dict[str, Tensor]:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = read_tensors(folder)
    found = {}
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = [tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")]
        found[module] = dequantize_gemm(*parts, bits=4, group_size=block["group_size"]).t()
    return found
