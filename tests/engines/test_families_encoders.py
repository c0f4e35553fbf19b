"""Encoders and encoder-decoders: every family's rows against a tiny model of transformers' own making."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from tests.engines.common import load
from tests.engines.encoder_families import CASES
from tests.engines.families import Case, assert_awq_is_close, assert_loads, assert_selection, convert, save

# transformers says so whenever a config is passed along with a checkpoint that has one
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_family(case: Case, tmp_path):
    source = save(case, tmp_path / "in")
    assert_selection(case, source, group_size=32)
    assert_loads(case, source, tmp_path)
    assert_awq_is_close(source, convert(source, tmp_path / "awq", format="awq"))


UNLOADABLE = {name: case for name, case in CASES.items() if case.loads != "packed"}


@pytest.mark.parametrize("case", UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_transformers_cannot_load_packed_fails_loudly(case: Case, tmp_path):
    """T5's and ModernBERT's `_init_weights` reads `weight` of layers that have none while they are packed.

    Nomic's stored Wqkv becomes three layers while it is loaded, and `weight_shape` is cut in three with it.
    """
    folder = convert(save(case, tmp_path / "in"), tmp_path / "out", format="compressed-tensors")
    with pytest.raises((AttributeError, RuntimeError), match=r"has no attribute 'weight'|ignore_mismatched_sizes"):
        load(folder, case.model)
