"""Checkpoints made by compressed-tensors and GPTQModel: we read the values that their own libraries read.

All comparisons are bit for bit: a product of a code and a scale is exact in float32, so that rounding it once to the
dtype that the peer multiplies in is the same rounding: the scales' own, bfloat16 in compressed-tensors and in
GPTQModel's AWQ, float16 in GPTQ. The compressed-tensors part runs in the ordinary test environment, the other where
GPTQModel is (`install_gptqmodel.sh`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import quantconvert
from quantconvert.layouts import LAYOUTS
from tests.builders import read_tensors
from tests.engines import peers
from tests.engines.decoding import decode_all, quantization_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("plain_dequantization")]

GROUP = {"strategy": "group", "group_size": peers.GROUP}
TOKEN = {"num_bits": 8, "dynamic": True, "strategy": "token"}
STATIC = {"num_bits": 8, "strategy": "tensor"}
COMPRESSED: dict[str, dict[str, Any]] = {
    "W4A16 g32": {"weights": {"num_bits": 4, **GROUP}},
    "W4A16 g32 asymmetric": {"weights": {"num_bits": 4, **GROUP, "symmetric": False}},
    "W4A16 channel asymmetric": {"weights": {"num_bits": 4, "strategy": "channel", "symmetric": False}},
    "W4A16 g32 actorder weight": {"weights": {"num_bits": 4, **GROUP, "actorder": "weight"}},
    "W8A16 channel": {"weights": {"num_bits": 8, "strategy": "channel"}},
    "W8A16 g32 asymmetric": {"weights": {"num_bits": 8, **GROUP, "symmetric": False}},
    "W8A16 tensor asymmetric": {"weights": {"num_bits": 8, "strategy": "tensor", "symmetric": False}},
    "W8A8": {"weights": {"num_bits": 8, "strategy": "channel"}, "activations": TOKEN},
    "W8A8 tensor": {"weights": {"num_bits": 8, "strategy": "tensor"}, "activations": TOKEN},
    "W8A8 g32": {"weights": {"num_bits": 8, **GROUP}, "activations": TOKEN},
    "W4A8 g32": {"weights": {"num_bits": 4, **GROUP}, "activations": TOKEN},
    "W4A8 g32 packed": {
        "weights": {"num_bits": 4, **GROUP}, "activations": TOKEN, "forced_format": "pack-quantized",
    },
}  # fmt: skip
BY_GPTQMODEL: dict[str, dict[str, Any]] = {
    "rtn": {"kind": "rtn", "bits": 4},
    "rtn int8 channel": {"kind": "rtn", "bits": 8, "group_size": -1},
    "gptq": {"kind": "gptq", "bits": 4, "desc_act": False},
    "gptq desc_act": {"kind": "gptq", "bits": 4, "desc_act": True, "act_group_aware": False},
    "gptq_v2 asymmetric": {"kind": "gptq", "bits": 4, "sym": False, "format": "gptq_v2", "desc_act": False},
    "gptq int8": {"kind": "gptq", "bits": 8, "desc_act": False},
    "gptq int8 desc_act": {"kind": "gptq", "bits": 8, "desc_act": True, "act_group_aware": False},
    "awq": {"kind": "awq", "bits": 4},
    "awq asymmetric": {"kind": "awq", "bits": 4, "sym": False},
}


@dataclass
class Made:
    """A peer's folder, and what the peer reads from it."""

    name: str
    folder: Path
    weights: dict[str, Tensor]

    @property
    def dtype(self) -> Any:
        """What the peer multiplies in, and what to ask for."""
        (dtype,) = {weight.dtype for weight in self.weights.values()}
        return str(dtype).removeprefix("torch.")


def make_compressed(work: Path, name: str, options: dict[str, Any]) -> Made:
    pytest.importorskip("compressed_tensors")
    source = peers.llama(work / "in")
    return Made(name, work / "out", peers.by_compressed_tensors(source, work / "out", **options))


def make_gptqmodel(work: Path, name: str, options: dict[str, Any], one_sided: bool = True) -> Made:
    pytest.importorskip("gptqmodel")
    source = peers.llama(work / "in", one_sided)
    weights = peers.by_gptqmodel(source, work / "out", **{"group_size": peers.GROUP, **options})
    return Made(name, work / "out", weights)


@pytest.fixture(scope="module", params=[*COMPRESSED, *BY_GPTQMODEL])
def made(request, tmp_path_factory) -> Made:
    name, work = request.param, tmp_path_factory.mktemp("peer")
    if name in COMPRESSED:
        return make_compressed(work, name, COMPRESSED[name])
    return make_gptqmodel(work, name, BY_GPTQMODEL[name])


def assert_same_values(made: Made, plain: dict[str, Tensor]) -> None:
    """Quantized modules as the peer reads them, every other tensor as the peer stored it, and nothing else."""
    stored = read_tensors(made.folder)
    kept = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in made.weights}
    assert len(made.weights) == peers.LINEARS
    assert set(plain) == {f"{module}.weight" for module in made.weights} | set(kept)
    for module, weight in made.weights.items():
        assert plain[f"{module}.weight"].dtype == weight.dtype
        assert torch.equal(plain[f"{module}.weight"], weight), module
    for name, tensor in kept.items():
        assert torch.equal(plain[name], tensor), name


def test_dequantize_gives_the_peers_values(made: Made, tmp_path):
    quantconvert.dequantize(made.folder, tmp_path / "plain", made.dtype)
    assert_same_values(made, read_tensors(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "quantize_config.json").exists()  # vLLM would take it for the config


BIASES = "products of zero points and scales are rounded, the zero points come back"


def refusal(name: str, layout: str) -> str | None:
    """Why a layout cannot hold what a peer wrote; None where it can."""
    if "desc_act" in name:
        return "orders columns by g_idx"
    if layout == "fp8":
        return "fp8 holds FP8_BLOCK alone"
    if layout == "mlx" and ("tensor" in name or "channel" in name or name == "W8A8"):
        return "mlx has groups of 32, 64 or 128"
    if layout == "mlx" and "asymmetric" in name:
        return "symmetric only" if "W8" in name else BIASES
    if layout in ("awq", "gptq") and "tensor" in name:
        return "no per-tensor scales"
    if layout == "awq" and ("int8" in name or "W8" in name):
        return "awq holds 4 bits only"
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repack_keeps_the_peers_values(made: Made, layout: str, tmp_path):
    reason = refusal(made.name, layout)
    if reason == BIASES:
        quantconvert.repack(made.folder, tmp_path / "out", layout)
        quantconvert.repack(tmp_path / "out", tmp_path / "again", "gptq")
        quantconvert.dequantize(tmp_path / "again", tmp_path / "plain", made.dtype)
        return assert_same_values(made, read_tensors(tmp_path / "plain"))
    if reason:
        with pytest.raises(quantconvert.QuantConvertError, match=reason):
            quantconvert.repack(made.folder, tmp_path / "out", layout)
        return
    plan = quantconvert.repack(made.folder, tmp_path / "out", layout).plan
    assert len(plan.quantized) == peers.LINEARS
    quantconvert.dequantize(tmp_path / "out", tmp_path / "plain", made.dtype)
    assert_same_values(made, read_tensors(tmp_path / "plain"))
    if layout in ("gptq", "compressed-tensors"):  # an independent decoder says so too
        for module, weight in decode_all(tmp_path / "out", torch.float32).items():
            assert torch.equal(weight.to(made.weights[module].dtype), made.weights[module]), module


def test_inspect(made: Made):
    found = quantconvert.inspect(made.folder)
    assert found.quant_method == quantization_config(made.folder)["quant_method"]
    assert found.num_quantized_modules == peers.LINEARS
    (line,) = found.schemes
    bits = "int8" if "int8" in made.name or "W8" in made.name else "int4"
    usual = "per channel" if made.name == "W8A8" else "g32"
    width = next((f"per {w}" for w in ("channel", "tensor") if w in made.name), usual)
    assert line.startswith(f"{bits} {width}")
    assert ("asymmetric" in line or "zero points" in line) == ("asymmetric" in made.name)


@pytest.mark.parametrize(
    "one_sided",
    [
        False,
        True,
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_v1_asymmetric(bits: int, one_sided: bool, tmp_path):
    """GPTQModel's RTN writes asymmetric weights as v1; rows of one sign have zero points of 0."""
    made = make_gptqmodel(tmp_path, "rtn asymmetric", {"kind": "rtn", "bits": bits, "sym": False}, one_sided)
    quantconvert.dequantize(made.folder, tmp_path / "plain", made.dtype)
    assert_same_values(made, read_tensors(tmp_path / "plain"))


def test_two_config_groups(tmp_path):
    """Whose targets overlap: a pattern wins over a class."""
    attention = {"weights": {"num_bits": 8, "strategy": "channel"}, "activations": TOKEN}
    made = make_compressed(tmp_path, "mixed", {"weights": {"num_bits": 4, **GROUP}, "attention": attention})
    assert quantization_config(made.folder)["format"] == "mixed-precision"
    quantconvert.dequantize(made.folder, tmp_path / "plain", made.dtype)
    assert_same_values(made, read_tensors(tmp_path / "plain"))
    plan = quantconvert.repack(made.folder, tmp_path / "again", "compressed-tensors").plan
    assert sorted((s.label, n) for s, n in plan.schemes.items()) == [
        ("int4 g32 symmetric", 6), ("int8 per channel symmetric, int8 activations", 8),
    ]  # fmt: skip


RARE: dict[str, dict[str, Any]] = {
    "W8A8 asymmetric": {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}, "activations": TOKEN},
    "W8A8 static": {"weights": {"num_bits": 8, "strategy": "channel"}, "activations": STATIC},
}


@pytest.mark.parametrize("options", RARE.values(), ids=RARE)
def test_rare_schemes_are_read_or_refused(options: dict[str, Any], tmp_path):
    made = make_compressed(tmp_path, "rare", options)
    try:
        quantconvert.dequantize(made.folder, tmp_path / "plain", made.dtype)
    except quantconvert.QuantConvertError:
        return
    assert_same_values(made, read_tensors(tmp_path / "plain"))


def test_weight_only_int8_stays_weight_only(tmp_path):
    """`naive-quantized` int8 without activations: repacking must not make the engine round activations."""
    options = {"weights": {"num_bits": 8, "strategy": "channel"}, "forced_format": "naive-quantized"}
    made = make_compressed(tmp_path, "naive", options)
    with pytest.raises(quantconvert.UnsupportedError, match="stores int8 without quantizing activations"):
        quantconvert.repack(made.folder, tmp_path / "again", "compressed-tensors")


def test_transformers_reads_the_dtype_asked_for(tmp_path):
    """`dtype="auto"` is the default of transformers 5: it follows config.json, and would round the weights again."""
    import transformers

    made = make_compressed(tmp_path, "W4A16 g32", COMPRESSED["W4A16 g32"])
    quantconvert.dequantize(made.folder, tmp_path / "plain", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.float32


def test_desc_act_was_in_play(tmp_path):
    """The columns of the case above are out of order, or it would say nothing of `g_idx`."""
    made = make_gptqmodel(tmp_path, "gptq desc_act", BY_GPTQMODEL["gptq desc_act"])
    g_idx = read_tensors(made.folder)["model.layers.0.mlp.down_proj.g_idx"]
    assert g_idx.bincount().tolist() == [peers.GROUP] * (256 // peers.GROUP)
    assert not torch.equal(g_idx, g_idx.sort().values)
