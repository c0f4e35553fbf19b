"""The golden files are what the installed peers make today, from the codes stored in them.

compressed-tensors is part of the ordinary test environment; GPTQModel has its own (`install_gptqmodel.sh`).
"""

from __future__ import annotations

import pytest
import torch

from tests import golden
from tests.golden import make

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", golden.FILES)
def test_peers_make_the_same_bytes_again(name: str):
    document = golden.load(name)
    package, pack = make.PACKERS[name]
    assert document["package"] == package
    pytest.importorskip(package.replace("-", "_"))
    for case in document["cases"]:
        made = pack(case)
        assert set(made) == set(case["tensors"]), case["name"]
        for suffix, expected in case["tensors"].items():
            assert made[suffix].dtype == expected.dtype, (case["name"], suffix)
            assert torch.equal(made[suffix], expected), (case["name"], suffix)
