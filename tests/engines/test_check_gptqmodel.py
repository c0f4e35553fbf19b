"""`quantconvert check` of what transformers loads by GPTQModel, in the environment of `install_gptqmodel.sh`."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantconvert
from tests.engines.breaking import broken
from tests.engines.common import TINY_LLAMA

pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_a_result_beside_its_source(layout: str, tmp_path: Path):
    quantconvert.convert(TINY_LLAMA, tmp_path / "out", format=layout)
    good = quantconvert.check(tmp_path / "out", TINY_LLAMA, tokens=512)
    assert good.kl is not None
    assert 0 <= good.kl < 0.05
    bad = quantconvert.check(broken(tmp_path / "out"), TINY_LLAMA, tokens=512, max_kl=0.05)
    assert not bad.is_ok
