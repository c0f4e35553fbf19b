"""Golden bytes: from the same codes, our layouts make exactly what the peers' own packers made (`tests/golden`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantconvert.layouts import LAYOUTS
from quantconvert.layouts.base import Stored
from quantconvert.quantized import Quantized
from quantconvert.schemes import Scheme
from tests import golden

CASES = {f"{name} {case['name']}": (name, case) for name in golden.FILES for case in golden.load(name)["cases"]}
every_case = pytest.mark.parametrize(("name", "case"), CASES.values(), ids=CASES)


def encoded(name: str, case: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors as they stand in a file: `encode` puts rows first, `outputs` says which are turned."""
    fmt, scheme, shape = LAYOUTS.find(name.replace("_", "-")), Scheme(**case["scheme"]), tuple(case["codes"].shape)
    blocks = fmt.encode(Quantized(*parts(case), scheme.number), scheme, shape)
    specs = fmt.outputs(shape, "BF16", scheme)
    assert set(blocks) == {spec.suffix for spec in specs}
    return {spec.suffix: blocks[spec.suffix].t() if spec.transposed else blocks[spec.suffix] for spec in specs}


@every_case
def test_encode_gives_the_peers_bytes(name: str, case: dict[str, Any]):
    found = encoded(name, case)
    assert set(found) == set(case["tensors"])
    for suffix, expected in case["tensors"].items():
        assert found[suffix].dtype == expected.dtype, suffix
        assert torch.equal(found[suffix], expected), suffix


@every_case
def test_decode_finds_the_codes_in_the_peers_bytes(name: str, case: dict[str, Any]):
    fmt, scheme, shape = LAYOUTS.find(name.replace("_", "-")), Scheme(**case["scheme"]), tuple(case["codes"].shape)
    turned = {spec.suffix for spec in fmt.outputs(shape, "BF16", scheme) if spec.transposed}
    blocks = {s: t.t().contiguous() if s in turned else t for s, t in case["tensors"].items()}
    v1 = name == "gptq" and scheme.symmetric
    found = fmt.decode(blocks, Stored("M", scheme, shape, {}, zero_offset=1 if v1 else 0, layout=fmt.name), shape[0])
    assert torch.equal(found.codes, case["codes"])
    assert torch.equal(found.scale, case["scale"])
    assert torch.equal(found.zero_points(), Quantized(*parts(case), scheme.number).zero_points())


def parts(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    return case["codes"], case["scale"], case["zero_point"]


@pytest.mark.parametrize("name", golden.FILES)
def test_every_code_and_the_extreme_zero_points_occur(name: str):
    """So that no nibble or byte could be in the wrong place unseen."""
    for case in golden.load(name)["cases"]:
        top = 2 ** case["scheme"]["num_bits"]
        assert len(case["codes"].unique()) == top
        if case["zero_point"] is not None and case["zero_point"].numel() > 1:
            assert {0, top - 1} <= set(case["zero_point"].flatten().tolist())
