"""What GPTQModel and transformers load from GPTQ folders is what an independent decoder reads from the files.

Needs the environment of `install_gptqmodel.sh`; skipped elsewhere. A quantized layer shown the identity matrix answers
with its own weight, so weights are compared bit for bit with `decode_gptq`: GPTQModel's plain torch kernel multiplies
`scale * (u - zero)` in float16. Its `torch.compile` is switched off (100 s of compiling, the same numbers).

Logits reach about 20; int4 moves them by 1.6, int8 by 0.09. The plain kernel in float32 gives the reference's logits
(`EXACT`; measured 0); in float16 it rounds activations: measured 0.028 at most, bounded at 0.1. Which kernel
transformers picks by itself depends on the CPU, and some round activations to bfloat16 (measured 0.26): bounded at 0.5.
The first run may compile that kernel, later ones take it from GPTQModel's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gptqmodel")

from gptqmodel import BACKEND, GPTQModel
from transformers import GPTQConfig

from quantconvert.api import convert
from tests.builders import read_tensors
from tests.engines import moe
from tests.engines.common import TINY_LLAMA, heldout_windows, load, logits
from tests.engines.decoding import quantization_config
from tests.engines.gptqmodel_folders import Conversions, assert_logits, assert_weights, convert_decode

# these libraries warn of much that is not ours to mend: enum registrations, temporary folders, configs passed along
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("plain_dequantization")]

PLAIN_KERNEL, ANY_KERNEL, EXACT = 0.1, 0.5, 1e-4
GROUPED: dict[str, dict[str, Any]] = {
    "int4 g128": {},
    "int4 g128 asymmetric": {"symmetric": False},
    "int8 g128": {"bits": 8},
    "int8 g128 asymmetric": {"bits": 8, "symmetric": False},
    "down_proj skipped": {"ignore": ("*.down_proj",)},
}
GPTQMODEL_ONLY: dict[str, dict[str, Any]] = {
    "int4 channel": {"group_size": -1},
    "int8 channel": {"bits": 8, "group_size": -1},
    "first-last-8": {"preset": "first-last-8"},
    "down-8, other group size": {"rules": ["*.down_proj=W8A16:g64"]},
    "one layer skipped": {"ignore": ("*.layers.0.mlp.down_proj",)},
}
SCHEMES = {**GROUPED, **GPTQMODEL_ONLY}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Conversions:
    return Conversions(SCHEMES, lambda: tmp_path_factory.mktemp("gptq"), format="gptq")


def load_by_gptqmodel(folder: Path) -> Any:
    """Checks too that the model holds the tensors of the file and no others."""
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.eval()
    assert set(model.state_dict()) == set(read_tensors(folder))
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptqmodel(scheme: str, converted: Conversions):
    case = converted(scheme)
    model = load_by_gptqmodel(case.folder)
    assert_weights(model, case.decoded)
    assert_logits(model, case.reference, PLAIN_KERNEL)


def test_the_comparison_could_fail(converted: Conversions):
    ids = heldout_windows()[:2]
    original = logits(load(TINY_LLAMA), ids)
    assert (logits(converted("int8 g128").reference, ids) - original).abs().max() > 100 * EXACT
    assert (logits(converted("int4 g128").reference, ids) - original).abs().max() > 2 * ANY_KERNEL


@pytest.mark.parametrize("scheme", GROUPED)
def test_zero_points_are_stored_as_the_version_says(scheme: str, converted: Conversions):
    """v1 only where all stored zero points are 2^(b-1) - 1, so that adding one never carries into a neighbour."""
    folder = converted(scheme).folder
    config = quantization_config(folder)
    assert config["checkpoint_format"] == ("gptq" if config["sym"] else "gptq_v2")
    stored = {int(w) for name, t in read_tensors(folder).items() if name.endswith("qzeros") for w in t.unique()}
    constant = {4: 0x77777777, 8: 0x7F7F7F7F}[config["bits"]]
    assert (stored == {constant}) == config["sym"]


@pytest.mark.parametrize("scheme", GROUPED)
def test_transformers_with_the_plain_kernel(scheme: str, converted: Conversions):
    case = converted(scheme)
    asked = GPTQConfig(bits=quantization_config(case.folder)["bits"], backend="gptq_torch")
    model = load(case.folder, dtype=torch.float32, quantization_config=asked)
    assert_logits(model, case.reference, EXACT)
    assert_weights(model, case.decoded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int4 g128", "int4 g128 asymmetric", "int8 g128"])
def test_transformers_with_the_kernel_it_picks(scheme: str, dtype: torch.dtype, converted: Conversions):
    case = converted(scheme)
    assert_logits(load(case.folder, dtype=dtype), case.reference, ANY_KERNEL)


def test_transformers_refuses_mixed_precision(converted: Conversions):
    """It reads no `dynamic`; a failure is loud, as shapes differ."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(converted("first-last-8").folder, dtype=torch.float16)


def test_transformers_leaves_one_layer_alone(converted: Conversions):
    case = converted("one layer skipped")
    assert_logits(load(case.folder, dtype=torch.float32), case.reference, ANY_KERNEL)


MOE: dict[str, dict[str, Any]] = {
    "int4 g64": {"group_size": 64},
    "int4 g64 asymmetric": {"group_size": 64, "symmetric": False},
    "int8 g32": {"bits": 8, "group_size": 32},
    "experts-4-rest-8": {"group_size": 64, "preset": "experts-4-rest-8"},
}


@pytest.mark.parametrize("scheme", MOE)
def test_gptqmodel_reads_experts(scheme: str, tmp_path):
    """Each expert has tensors of its own, as GPTQModel wants them; transformers cannot load these."""
    source = moe.save(moe.qwen3_moe, tmp_path / "in")
    case = convert_decode(source, tmp_path, format="gptq", **MOE[scheme])
    assert sum(".experts." in name for name in case.decoded) == 2 * 4 * 3
    model = load_by_gptqmodel(case.folder)
    assert_weights(model, case.decoded)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))
    assert_logits(model, case.reference, PLAIN_KERNEL, ids)


def test_transformers_is_told_of_no_expert(tmp_path):
    source = moe.save(moe.qwen3_moe, tmp_path / "in")
    convert(source, tmp_path / "out", format="gptq", group_size=64)
    names = quantization_config(tmp_path / "out")["modules_in_block_to_quantize"]
    assert {name for (name,) in names} == {f"self_attn.{p}_proj" for p in "qkvo"}
