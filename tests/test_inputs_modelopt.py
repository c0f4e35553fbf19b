"""ModelOpt's NVFP4: both scales multiply; beside it float8 and plain weights, with the config in either place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, write_checkpoint

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SETTINGS = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}


def expected(weight: Tensor, scale: Tensor, second: Tensor) -> Tensor:
    """In float64, from the page of the format alone."""
    codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1).long()
    signs = 1 - 2 * (codes >> 3).double()
    values = signs * VALUES.double()[codes & 7]
    return values * scale.double().repeat_interleave(16, 1) * second.double()


def write(folder: Path, tensors: dict[str, Tensor], block: dict[str, Any]) -> Path:
    """Sizes are those of the weights, not of the bytes."""
    config = write_checkpoint(folder, llama_tensors(layers=1), LLAMA_CONFIG | {"num_hidden_layers": 1} | block)
    text = (config / "config.json").read_text()
    write_checkpoint(folder, tensors)
    (folder / "config.json").write_text(text)
    return folder


def nvfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random codes in place of every projection of the layers; what is stored, and what it means."""
    generator, stored, means = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in tensors.items():
        if "_proj.weight" not in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        weight = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
        scale = (torch.rand(rows, columns // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
        second = torch.rand((), generator=generator) / 1000
        stored |= {name: weight, f"{name}_scale": scale, f"{name}_scale_2": second}
        stored[name.replace(".weight", ".input_scale")] = torch.ones(())
        means[name] = expected(weight, scale, second)
    return stored, means


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_it_is_the_product_of_code_and_both_scales(tmp_path: Path, place: str):
    stored, means = nvfp4(llama_tensors(layers=1))
    inside = {"quantization_config": SETTINGS | {"quant_method": "modelopt"}} if place == "config.json" else {}
    source = write(tmp_path / "in", stored, inside)
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": SETTINGS}))
    quantconvert.dequantize(source, tmp_path / "plain", "float32")
    plain = read_tensors(tmp_path / "plain")
    assert set(plain) == set(llama_tensors(layers=1))
    for name, values in means.items():
        assert torch.allclose(plain[name].double(), values, rtol=1e-6, atol=0), name
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(quantconvert.UnsupportedError, match="--requantize"):
        quantconvert.plan(source, scheme="W4A16:g32")
    quantconvert.convert(source, tmp_path / "out", scheme="W4A16:g32", requantize=True, verify=True)


@pytest.mark.parametrize("wrong", ["missing", "shape", "dtype", "second"])
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, wrong: str):
    stored, means = nvfp4(llama_tensors(layers=1))
    name = next(iter(means))
    if wrong == "missing":
        del stored[f"{name}_scale"]
    elif wrong == "shape":
        stored[f"{name}_scale"] = stored[f"{name}_scale"][:, 1:].contiguous()
    elif wrong == "dtype":
        stored[f"{name}_scale"] = stored[f"{name}_scale"].float()
    else:
        stored[f"{name}_scale_2"] = torch.ones(2)
    block = {"quantization_config": SETTINGS | {"quant_method": "modelopt"}}
    source = write(tmp_path / "in", stored, block)
    with pytest.raises(quantconvert.CheckpointError, match="no partner" if wrong == "missing" else "expected"):
        quantconvert.dequantize(source, tmp_path / "plain", "float32")
    assert not (tmp_path / "plain").exists()
