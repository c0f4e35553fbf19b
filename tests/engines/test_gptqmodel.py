"""What transformers and GPTQModel load from AWQ folders is what an independent decoder reads from the files.

Needs an environment of its own (`tests/engines/install_gptqmodel.sh`); skipped elsewhere. A quantized layer shown the
identity matrix answers with its own weight, so weights are compared bit for bit through the kernel's public forward:
GPTQModel's plain torch kernel multiplies `(u - z) * s` in float16, as `decode_awq` does.

Logits reach about 20, and quantization moves them by more than 1. The plain kernel rounds activations to float16:
they move by 0.025 at most (measured), bounded at 0.1. Which kernel transformers picks by itself depends on the CPU, and
some round activations to bfloat16 (measured 0.22): bounded at 0.5. The first run compiles that kernel (90 s on two
cores), later ones take it from GPTQModel's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gptqmodel")

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from transformers import AwqConfig
from transformers.utils.quantization_config import AwqBackend

from quantconvert.api import convert
from quantconvert.layouts.awq import ORDER
from quantconvert.layouts.packing import pack_rows_int4
from tests.builders import decode_awq, read_tensors
from tests.engines import moe
from tests.engines.common import EXAMPLES, TINY_LLAMA, heldout_loss, load, write_result
from tests.engines.decoding import decode_all
from tests.engines.gptqmodel_folders import Conversions, assert_logits, assert_weights, convert_decode

# these libraries warn of much that is not ours to mend: enum registrations, temporary folders, configs passed along
pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN_KERNEL, ANY_KERNEL = 0.1, 0.5
LOSS_BOUND = 0.012
GROUPED: dict[str, dict[str, Any]] = {"int4 g128 asymmetric": {}, "int4 g128 symmetric": {"symmetric": True}}
SCHEMES = {**GROUPED, "int4 channel": {"group_size": -1}}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Conversions:
    return Conversions(SCHEMES, lambda: tmp_path_factory.mktemp("awq"), format="awq")


def load_by_gptqmodel(folder: Path) -> Any:
    return GPTQModel.load(str(folder), backend=BACKEND.AWQ_TORCH, device="cpu", dtype=torch.float16).model.eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_with_the_plain_kernel(scheme: str, converted: Conversions):
    case = converted(scheme)
    config = AwqConfig(backend=AwqBackend.TORCH_AWQ)
    model = load(case.folder, dtype=torch.float16, quantization_config=config)
    assert_weights(model, case.decoded)
    assert_logits(model, case.reference, PLAIN_KERNEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", GROUPED)
def test_transformers_with_the_kernel_it_picks(scheme: str, dtype: torch.dtype, converted: Conversions):
    case = converted(scheme)
    model = load(case.folder, dtype=dtype)
    assert_logits(model, case.reference, ANY_KERNEL)
    assert heldout_loss(model) < heldout_loss(load(TINY_LLAMA)) + LOSS_BOUND


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptqmodel(scheme: str, converted: Conversions):
    case = converted(scheme)
    model = load_by_gptqmodel(case.folder)
    assert_weights(model, case.decoded)
    assert_logits(model, case.reference, PLAIN_KERNEL)
    assert heldout_loss(model) < heldout_loss(load(TINY_LLAMA)) + LOSS_BOUND


@pytest.mark.usefixtures("auto_equalize")
@pytest.mark.parametrize("name", ["tiny-llama", "outlier-llama"])
def test_the_default_result_loads(name: str, tmp_path: Path):
    """Equalized, by GPTQModel and by transformers: norms and scales that go together."""
    folder = tmp_path / "out"
    convert(EXAMPLES / name, folder)
    assert (folder / "quantconvert.factors").exists()
    decoded = decode_all(folder)
    reference = load(write_result(EXAMPLES / name, folder, tmp_path / "plain", decoded))
    for model in (
        load_by_gptqmodel(folder),
        load(folder, dtype=torch.float16, quantization_config=AwqConfig(backend=AwqBackend.TORCH_AWQ)),
    ):
        assert_weights(model, decoded)
        assert_logits(model, reference, PLAIN_KERNEL)


def test_transformers_leaves_ignored_layers_alone(tmp_path):
    case = convert_decode(TINY_LLAMA, tmp_path, format="awq", ignore=("*.down_proj",))
    model = load(case.folder, dtype=torch.float16, quantization_config=AwqConfig(backend=AwqBackend.TORCH_AWQ))
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert_weights(model, case.decoded)
    assert_logits(model, case.reference, PLAIN_KERNEL)


def test_gptqmodel_leaves_ignored_layers_alone(tmp_path):
    case = convert_decode(TINY_LLAMA, tmp_path, format="awq", ignore=("*.down_proj",))
    assert_logits(load_by_gptqmodel(case.folder), case.reference, PLAIN_KERNEL)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptqmodel_reads_experts(symmetric: bool, tmp_path):
    """transformers 5 loads AWQ experts as random numbers; the plan's notes send users of `--format awq` here."""
    source = moe.save(moe.qwen3_moe, tmp_path / "in")
    case = convert_decode(source, tmp_path, format="awq", group_size=64, symmetric=symmetric)
    model = load_by_gptqmodel(case.folder)
    assert_weights(model, case.decoded)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))
    assert_logits(model, case.reference, PLAIN_KERNEL, ids)


@pytest.mark.parametrize("shape", [(8, 128), (64, 32), (40, 256)])
def test_words_are_theirs(shape: tuple[int, int]):
    """Golden: the same codes [out, in] through GPTQModel's packer, which takes and gives [in, out]."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, (shape[0], 2), generator=generator).to(torch.uint8)
    qweight, qzeros = pack_awq(codes.t().int(), zeros.t().int(), 4)
    assert torch.equal(pack_rows_int4(codes, ORDER).t(), qweight)
    assert torch.equal(pack_rows_int4(zeros, ORDER).t(), qzeros)


@pytest.mark.parametrize("scheme", GROUPED)
def test_their_dequantizer_agrees_with_ours(scheme: str, converted: Conversions):
    tensors = read_tensors(converted(scheme).folder)
    for module in converted(scheme).decoded:
        parts = (tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales"))
        assert torch.equal(dequantize_gemm(*parts, bits=4, group_size=128).t(), decode_awq(tensors, module)), module
