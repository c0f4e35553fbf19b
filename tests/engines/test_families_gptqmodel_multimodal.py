"""What transformers loads of vision-language and hybrid models from AWQ and GPTQ folders, by GPTQModel's kernels.

As `test_families_gptqmodel.py`, whose bounds hold here too. Mixtures of experts are not among them: transformers loads
those without an error and with experts at random.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gptqmodel")

from transformers import AwqConfig, GPTQConfig
from transformers.utils.quantization_config import AwqBackend

from tests.builders import decode_awq, read_tensors, write_checkpoint
from tests.engines import moe_families, multimodal_families
from tests.engines.common import load
from tests.engines.decoding import decode_all
from tests.engines.families import convert, save
from tests.engines.gptqmodel_families import AWQ_TOLERANCE, GPTQ_TOLERANCE, assert_same, awq

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("plain_dequantization")]

HYBRID = {name: moe_families.CASES[name] for name in ("qwen3_5", "qwen3_5_text")}
CASES = multimodal_families.CASES | HYBRID


@pytest.mark.parametrize("name", CASES)
def test_awq(name: str, tmp_path):
    source, folder, config = awq(CASES[name], tmp_path)
    tensors = read_tensors(folder)
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    decoded = {module: decode_awq(tensors, module) for module in modules}
    assert_same(CASES[name], source, folder, decoded, AWQ_TOLERANCE, config)


@pytest.mark.parametrize("name", CASES)
def test_gptq(name: str, tmp_path):
    source = save(CASES[name], tmp_path / "in")
    folder = convert(source, tmp_path / "out", format="gptq")
    config = GPTQConfig(bits=4, backend="gptq_torch")
    assert_same(CASES[name], source, folder, decode_all(folder), GPTQ_TOLERANCE, config)


@pytest.mark.parametrize("name", ["llava", "gemma3", "llava_onevision"])
def test_awq_leaves_towers_alone_that_the_hub_calls_otherwise(name: str, tmp_path):
    """transformers 5 knows no `vision_model` between `vision_tower` and `encoder`: its plain layers stayed random."""
    case = CASES[name]
    saved = save(case, tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    tensors = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in read_tensors(saved).items()
    }
    folder = convert(write_checkpoint(tmp_path / "hub", tensors, config), tmp_path / "out", format="awq")
    load(folder, case.model, quantization_config=AwqConfig(bits=4, group_size=32, backend=AwqBackend.TORCH_AWQ))
