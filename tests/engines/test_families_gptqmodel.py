"""What transformers loads of each family from AWQ and GPTQ folders, by GPTQModel's plain kernels.

Needs the environment of `install_gptqmodel.sh`; skipped elsewhere. AWQ's plain kernel rounds activations to float16:
outputs move by 0.0027 of their largest at most (measured), bounded at 0.008, where int4 moves them by more than ten
times that. GPTQ's gives the reference's (measured 0).
"""

from __future__ import annotations

import pytest

pytest.importorskip("gptqmodel")

from transformers import GPTQConfig

import quantconvert
from quantconvert.engines import ENGINES
from tests.builders import decode_awq, read_tensors
from tests.engines import dense_families, encoder_families
from tests.engines.common import load
from tests.engines.decoding import decode_all
from tests.engines.families import convert, save
from tests.engines.gptqmodel_families import AWQ_TOLERANCE, GPTQ_TOLERANCE, assert_same, awq

# these libraries warn of much that is not ours to mend: enum registrations, temporary folders, configs passed along
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("plain_dequantization")]

CASES = dense_families.CASES | encoder_families.CASES

# Those of which `engines/transformers.py` says so. Missing keys: transformers goes on with uninitialised memory.
SCALED = {"starcoder2", "gptj", "gpt_neox", "falcon", "falcon 40b", "bloom", "mpt"}
REINITIALIZED = {"gpt_bigcode", "mamba", "mamba2", "falcon_mamba", "modernbert", "modernbert classifier",
                 "modernbert-decoder", "t5", "t5 gated", "t5 encoder", "t5 classifier", "mt5", "umt5"}  # fmt: skip
AWQ_REFUSED = SCALED | REINITIALIZED | {"nomic_bert"}

# optimum knows one stack of layers a model, under a name of its list: no encoder, of encoder-decoders the decoder
# alone. Everything else stays a plain layer without a weight: loud for most, missing keys for some.
# LFM3: transformers renames gate_proj to g_proj while it loads, after optimum has chosen its layers by name.
GPTQ_LOADS = {name for name in dense_families.CASES if name not in AWQ_REFUSED | {"lfm3"}} | {
    "starcoder2", "gptj", "gpt_neox", "bloom", "eurobert",
}  # fmt: skip


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


@pytest.mark.parametrize("name", sorted(CASES.keys() - GPTQ_LOADS))
def test_gptq_that_does_not_load_is_told(name: str, tmp_path):
    """Loud where the row says `refuses`, keys missing and no error where it says `wrong`."""
    source = save(CASES[name], tmp_path / "in")
    folder = convert(source, tmp_path / "out", format="gptq")
    plan = quantconvert.plan(source, group_size=32, format="gptq")
    said = ENGINES["transformers"].verdict(plan.loadable)
    assert said != "loads"
    error = AssertionError if said == "wrong" else (ValueError, AttributeError, RuntimeError)
    with pytest.raises(error):
        load(folder, CASES[name].model, quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
