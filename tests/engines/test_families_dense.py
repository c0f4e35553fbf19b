"""Decoders without experts: every family's rows against a tiny model of transformers' own making."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch

import quantconvert
from quantconvert.card import load_hint
from tests.engines.common import load
from tests.engines.dense_families import CASES, CONV1D
from tests.engines.families import Case, assert_awq_is_close, assert_loads, assert_selection, convert, outputs, save

# transformers says so whenever a config is passed along with a checkpoint that has one
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_family(case: Case, tmp_path):
    source = save(case, tmp_path / "in")
    assert_selection(case, source, group_size=32)
    assert_loads(case, source, tmp_path)
    assert_awq_is_close(source, convert(source, tmp_path / "awq", format="awq"))


UNINITIALIZED = {name: case for name, case in CASES.items() if case.loads != "packed"}


@pytest.mark.parametrize("case", UNINITIALIZED.values(), ids=UNINITIALIZED)
def test_transformers_must_be_asked_to_dequantize(case: Case, tmp_path):
    """These models' `_init_weights` reads `weight` of layers that have none while they are packed: a loud failure."""
    folder = convert(save(case, tmp_path / "in"), tmp_path / "out", format="compressed-tensors")
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        load(folder, case.model)


@pytest.mark.parametrize("case", CONV1D.values(), ids=CONV1D)
def test_family_of_transposed_weights(case: Case, tmp_path):
    source = save(case, tmp_path / "in")
    assert_selection(case, source, group_size=32)
    folder = convert(source, tmp_path / "awq", format="awq")
    assert_awq_is_close(source, folder, transposed=("c_attn", "c_proj", "c_fc"))


@pytest.mark.parametrize("name", ["llama", "falcon", "mamba2", "gpt_bigcode"])
def test_the_line_that_is_printed_loads_it(name: str, tmp_path):
    """By running the line itself; AutoModelForCausalLM and CompressedTensorsConfig are transformers'."""
    import transformers

    source = save(CASES[name], tmp_path / "in")
    result = quantconvert.convert(source, tmp_path / "out", group_size=32, format="compressed-tensors")
    (line,) = [line for line in load_hint(result.plan, str(result.out)) if "from_pretrained" in line]
    model = eval(
        line, {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "CompressedTensorsConfig")}
    )
    found, expected = outputs(CASES[name], model), outputs(CASES[name], load(source, CASES[name].model))
    for a, b in zip(found, expected, strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9
