"""Judging one weight: what tolerances excuse, and what they must not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import quantconvert
from quantconvert.methods import METHODS, Tolerance
from quantconvert.number import E4M3, INT4
from quantconvert.quantized import Quantized, dequantize
from quantconvert.schemes import Scheme
from quantconvert.verification.tolerances import FOREIGN
from quantconvert.verification.weights import Errors
from tests.builders import write_checkpoint

INT = Scheme(4, True, "channel")


def judged(tolerance: Tolerance, scheme: Scheme, w: torch.Tensor, quantized: Quantized) -> str | None:
    errors = Errors(scheme, tolerance, ("BF16", "BF16"))
    errors.add(w, dequantize(quantized), quantized)
    return errors.problem(judge_scales=False)


def test_a_weight_of_zeros_has_no_room_for_noise():
    codes = Quantized(torch.full((2, 8), 15, dtype=torch.uint8), torch.ones(2, 1), None, INT4)
    assert judged(FOREIGN, INT, torch.zeros(2, 8), codes) == "its relative error is inf: expected at most 0.5"
    still = Quantized(torch.full((2, 8), 8, dtype=torch.uint8), torch.ones(2, 1), None, INT4)
    assert judged(FOREIGN, INT, torch.zeros(2, 8), still) is None


def test_negative_floats_are_inside_their_range():
    scheme, tolerance = Scheme(8, True, "channel", type="float"), Tolerance(inside=0.5)
    assert scheme.number is E4M3
    scale = torch.ones(1, 1)
    right = Quantized(torch.tensor([[-400.0, 96.0]]).to(torch.float8_e4m3fn), scale, None, E4M3)
    values = right.codes.float()
    assert judged(tolerance, scheme, values.clone(), right) is None
    wrong = Quantized(torch.tensor([[-96.0, 96.0]]).to(torch.float8_e4m3fn), scale, None, E4M3)
    assert judged(tolerance, scheme, values.clone(), wrong) is not None
    beyond = torch.tensor([[-600.0, 96.0]])
    most = Quantized(torch.tensor([[-448.0, 96.0]]).to(torch.float8_e4m3fn), scale, None, E4M3)
    assert judged(tolerance, scheme, beyond, most) is None


def test_negative_scales_are_another_tool_s_right():
    """`w = code * -scale`: GPTQ by others has them. Steps have no sign; that is looked at apart."""
    w = torch.tensor([[-7.0, 3.0, 8.0, -2.0]])
    codes = Quantized((-w + 8).to(torch.uint8), -torch.ones(1, 1), None, INT4)
    assert torch.equal(dequantize(codes), w)
    assert judged(FOREIGN, INT, w.clone(), codes) is None
    assert judged(METHODS["rtn"].tolerance(INT, "BF16", "BF16"), INT, w.clone(), codes) is None


def test_what_repack_writes_is_judged_as_its_source_is(tmp_path: Path):
    """Codes with negative scales, of somebody else; in another layout they are no worse."""
    source, folder = write_checkpoint(tmp_path / "in"), tmp_path / "gptq"
    quantconvert.convert(source, folder, format="gptq", group_size=32)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"].neg_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "quantconvert.json").unlink()
    assert quantconvert.verify(folder).is_ok
    quantconvert.repack(folder, tmp_path / "again", "compressed-tensors", verify=True)
    assert json.loads((tmp_path / "again" / "quantconvert.json").read_text())["job"]["operation"] == "repack"
    assert quantconvert.verify(tmp_path / "again", folder).is_ok


def test_a_tensor_that_differs_is_not_counted_as_equal(tmp_path: Path):
    source, out = write_checkpoint(tmp_path / "in"), tmp_path / "out"
    quantconvert.convert(source, out)
    equal = quantconvert.verify(out, source).num_equal
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = quantconvert.verify(out, source)
    assert found.num_equal == equal - 1
    assert ("values", "model.norm.weight") in {(f.check, f.where) for f in found.findings}
