"""Quantized sources: what we read is what compressed-tensors' and transformers' own code makes of the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from tests.coded import kimi_model
from tests.inputs import FP8, LAYER, decoded, fp8_model, mxfp4_model

pytestmark = pytest.mark.usefixtures("toy_families")


@pytest.mark.parametrize("case", ["ct channel", "ct tensor", "ct block"])
def test_fp8_is_what_compressed_tensors_makes_of_it(tmp_path: Path, case: str):
    model = fp8_model(**FP8[case])
    group = model.config["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    found = decoded(model.write(tmp_path / "model"), group_size=32)
    assert set(found) == set(model.expected)
    for name, w in found.items():
        state = {"weight": model.tensors[name], "weight_scale": model.tensors[f"{name}_scale"].float()}
        assert torch.equal(FloatQuantizationCompressor.decompress(state, scheme)["weight"].float(), w), name


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path):
    model = mxfp4_model()
    found = decoded(model.write(tmp_path / "model"), group_size=32)
    stem = f"{LAYER}.mlp.experts"
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (model.tensors[f"{stem}.{name}_{part}"] for part in ("blocks", "scales"))
        turned = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, in, out]
        for e, w in enumerate(turned):
            if name == "down_proj":
                assert torch.equal(found[f"{stem}.{e}.down_proj.weight"], w.t())
            else:
                assert torch.equal(found[f"{stem}.{e}.gate_proj.weight"], w[:, 0::2].t())
                assert torch.equal(found[f"{stem}.{e}.up_proj.weight"], w[:, 1::2].t())


def test_kimi_is_what_compressed_tensors_makes_of_it():
    """The words that `kimi_model` packs by hand; `test_inputs_codes.py` holds our reader to what they say here."""
    model = kimi_model()
    scheme = QuantizationScheme.model_validate(model.config["quantization_config"]["config_groups"]["group_0"])
    assert len(model.expected) == 9
    for name, expected in model.expected.items():
        stem = name.removesuffix(".weight")
        state = {suffix: model.tensors[f"{stem}.{suffix}"] for suffix in ("weight_packed", "weight_shape")}
        state["weight_scale"] = model.tensors[f"{stem}.weight_scale"].float()
        theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(theirs.double(), expected), name
