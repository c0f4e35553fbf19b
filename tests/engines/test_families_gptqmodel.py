"""What transformers loads of each family from AWQ and GPTQ folders, by GPTQModel's plain kernels.

Needs the environment of `install_gptqmodel.sh`; skipped elsewhere. AWQ's plain kernel rounds activations to float16:
outputs move by 0.0027 of their largest at most (measured), bounded at 0.008, where int4 moves them by more than ten
times that. GPTQ's gives the reference's (measured 0).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
pytest.importorskip("gptqmodel")

from transformers import AwqConfig, GPTQConfig

from tests.builders import decode_awq, read_tensors
from tests.engines import test_families_dense, test_families_encoders
from tests.engines.common import load, write_reference
from tests.engines.decoding import decode_all
from tests.engines.families import Case, convert, outputs, save

# these libraries warn of much that is not ours to mend: enum registrations, temporary folders, configs passed along
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = test_families_dense.CASES | test_families_encoders.CASES
AWQ_TOLERANCE, GPTQ_TOLERANCE = 0.008, 1e-4

# The families whose tables have an `awq_problem`. Missing keys: transformers goes on with uninitialised memory.
SCALED = {"starcoder2", "gptj", "gpt_neox", "falcon", "falcon 40b", "bloom", "mpt"}
REINITIALIZED = {"gpt_bigcode", "mamba", "mamba2", "falcon_mamba", "modernbert", "modernbert classifier",
                 "modernbert-decoder", "t5", "t5 gated", "t5 encoder", "t5 classifier", "mt5", "umt5"}  # fmt: skip
AWQ_REFUSED = SCALED | REINITIALIZED | {"nomic_bert"}

# optimum knows one stack of layers a model, under a name of its list: no encoder, of encoder-decoders the decoder
# alone. Everything else stays a plain layer without a weight: loud for most, missing keys for some.
# LFM3: transformers renames gate_proj to g_proj while it loads, after optimum has chosen its layers by name.
GPTQ_LOADS = {name for name in test_families_dense.CASES if name not in AWQ_REFUSED | {"lfm3"}} | {
    "starcoder2", "gptj", "gpt_neox", "bloom", "eurobert",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def plain_dequantization() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_same(case: Case, source: Path, folder: Path, decoded: dict, tolerance: float, config: Any) -> None:
    reference = load(write_reference(source, folder, folder.parent / "reference", decoded), case.model)
    model = load(folder, case.model, quantization_config=config)
    assert sum(hasattr(module, "qweight") for module in model.modules()) == len(decoded)
    moved = []
    original = outputs(case, load(source, case.model))
    for found, expected, before in zip(outputs(case, model), outputs(case, reference), original, strict=True):
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= tolerance * largest
        moved.append((before - expected).abs().max() / largest)
    assert max(moved) > 10 * tolerance


def awq(case: Case, work: Path) -> tuple[Path, Path, AwqConfig]:
    source = save(case, work / "in")
    folder = convert(source, work / "out", format="awq")
    return source, folder, AwqConfig(bits=4, group_size=32, backend="torch_awq")


@pytest.mark.parametrize("name", [name for name in CASES if name not in AWQ_REFUSED])
def test_awq(name: str, tmp_path):
    source, folder, config = awq(CASES[name], tmp_path)
    tensors = read_tensors(folder)
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    decoded = {module: decode_awq(tensors, module) for module in modules}
    assert_same(CASES[name], source, folder, decoded, AWQ_TOLERANCE, config)


@pytest.mark.parametrize("name", sorted(AWQ_REFUSED))
def test_awq_is_not_chosen_where_it_does_not_load(name: str, tmp_path):
    _, folder, config = awq(CASES[name], tmp_path)
    errors = (AssertionError, AttributeError, RuntimeError)
    with pytest.raises(errors, match=r"\.scales'|has no attribute 'weight'|ignore_mismatched_sizes"):
        load(folder, CASES[name].model, quantization_config=config)


@pytest.mark.parametrize("name", [name for name in CASES if name in GPTQ_LOADS])
def test_gptq(name: str, tmp_path):
    source = save(CASES[name], tmp_path / "in")
    folder = convert(source, tmp_path / "out", format="gptq")
    config = GPTQConfig(bits=4, backend="gptq_torch")
    assert_same(CASES[name], source, folder, decode_all(folder), GPTQ_TOLERANCE, config)
