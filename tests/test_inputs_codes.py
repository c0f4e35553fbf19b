"""Integer codes that others wrote: compressed-tensors by its own library, GPTQ and AWQ packed here by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.builders import AWQ_ORDER, decode_compressed_tensors, read_tensors, weight
from tests.inputs import LAYER, SHAPES, Model, attention, config, decoded, plain_rest

pytestmark = pytest.mark.usefixtures("toy_families")
GROUP = 32


def pack_words(values: Tensor, order: tuple[int, ...], bits: int = 4) -> Tensor:
    """int32 [R, C * bits / 32]: of each run of columns, the one that `order` names first in the lowest bits."""
    per_word = 32 // bits
    runs = values.long().reshape(values.shape[0], -1, per_word)
    word = sum(runs[..., column] << (bits * i) for i, column in enumerate(order))
    assert isinstance(word, Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).contiguous()


def in_order(bits: int) -> tuple[int, ...]:
    return tuple(range(32 // bits))


def random_codes(rows: int, columns: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, I], float16 scales [O, G] and zero points [O, G]; one scale is zero, one the smallest there is."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    groups = columns // GROUP
    scales = (torch.rand(rows, groups, generator=generator) * 0.1).half()
    scales[0, 0], scales[1, 0] = 0.0, 2.0**-24
    return codes, scales, torch.randint(1, 2**bits, (rows, groups), generator=generator)


def coded_model(block: dict[str, Any]) -> Model:
    sizes = {"hidden_size": 160, "intermediate_size": 224}
    return Model(plain_rest(160), config("toy_dense", **sizes, quantization_config=block))


def gptq_model(bits: int, version: str, desc_act: bool, symmetric: bool) -> Model:
    block = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": desc_act, "sym": symmetric}
    model = coded_model(block | {"checkpoint_format": version})
    for i, (module, (rows, columns)) in enumerate(SHAPES.items()):
        codes, scales, zeros = random_codes(rows, columns, bits, seed=i)
        if symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        groups = torch.arange(columns) // GROUP
        if desc_act:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(i))]
        name = f"{LAYER}.{module}"
        stored = zeros - (1 if version == "gptq" else 0)
        model.tensors |= {
            f"{name}.qweight": pack_words(codes, in_order(bits), bits).t().contiguous(),
            f"{name}.qzeros": pack_words(stored.t(), in_order(bits), bits),
            f"{name}.scales": scales.t().contiguous(),
            f"{name}.g_idx": groups.to(torch.int32),
        }
        model.expected[f"{name}.weight"] = (codes - zeros[:, groups]) * scales.double()[:, groups]
    return model


def awq_model() -> Model:
    block = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    model = coded_model(block)
    for i, (module, (rows, columns)) in enumerate(SHAPES.items()):
        codes, scales, zeros = random_codes(rows, columns, 4, seed=i)
        name = f"{LAYER}.{module}"
        model.tensors |= {
            f"{name}.qweight": pack_words(codes.t(), AWQ_ORDER),
            f"{name}.qzeros": pack_words(zeros.t(), AWQ_ORDER),
            f"{name}.scales": scales.t().contiguous(),
        }
        groups = torch.arange(columns) // GROUP
        model.expected[f"{name}.weight"] = (codes - zeros[:, groups]) * scales.double()[:, groups]
    return model


def kimi_config() -> dict[str, Any]:
    """Kimi-K2's: routed experts in int4 of 32, everything else in the ignore list."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"dynamic": False}}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    }


def kimi_model() -> Model:
    """Experts compressed by the compressed-tensors library, attention in bfloat16."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model = Model(plain_rest(64) | attention(), config("toy_dense", quantization_config=kimi_config()))
    scheme = QuantizationScheme.model_validate(kimi_config()["config_groups"]["group_0"])
    for e in range(3):
        for i, (projection, shape) in enumerate(
            (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
        ):
            name = f"{LAYER}.mlp.experts.{e}.{projection}"
            w = weight(*shape, seed=10 * e + i)
            scale = (w.float().view(shape[0], -1, GROUP).abs().amax(-1) / 7.5).to(torch.bfloat16)
            state = {"weight": w, "weight_scale": scale}
            packed = PackedQuantizationCompressor.compress(state, scheme)
            model.tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
            wide = packed | {"weight_scale": scale.float()}
            expected = PackedQuantizationCompressor.decompress(wide, scheme)["weight"]
            model.expected[f"{name}.weight"] = expected.double()
    return model


MODELS: dict[str, Any] = {
    "kimi": kimi_model,
    "awq": awq_model,
    "gptq v1": lambda: gptq_model(4, "gptq", False, False),
    "gptq v2": lambda: gptq_model(4, "gptq_v2", False, False),
    "gptq v1 symmetric": lambda: gptq_model(4, "gptq", False, True),
    "gptq v2 symmetric": lambda: gptq_model(4, "gptq_v2", False, True),
    "gptq v1 desc_act": lambda: gptq_model(4, "gptq", True, False),
    "gptq v2 desc_act": lambda: gptq_model(4, "gptq_v2", True, True),
    "gptq v1 int8": lambda: gptq_model(8, "gptq", False, True),
    "gptq v2 int8 desc_act": lambda: gptq_model(8, "gptq_v2", True, False),
}


@pytest.mark.parametrize("kind", MODELS)
def test_codes_are_read_as_their_owners_do(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    found = decoded(source, group_size=GROUP)
    assert set(found) == set(model.expected)
    for name, w in found.items():
        assert torch.equal(w, model.expected[name].float()), name
    quantconvert.dequantize(source, tmp_path / "out", "float32")
    plain = read_tensors(tmp_path / "out")
    assert all(torch.equal(plain[name], w) for name, w in found.items())


@pytest.mark.parametrize("kind", MODELS)
def test_int4_to_int8_stays_within_half_a_step(tmp_path: Path, kind: str):
    """It needs no --requantize from four bits. Beyond half a step lies what a scale of 16 bits cuts off."""
    model = MODELS[kind]()
    source = model.write(tmp_path / "model")
    options: dict[str, Any] = {"bits": 8, "group_size": GROUP, "format": "compressed-tensors", "symmetric": True}
    quantconvert.convert(source, tmp_path / "out", requantize="int8" in kind, **options)
    stored = read_tensors(tmp_path / "out")
    for name, expected in model.expected.items():
        module = name.removesuffix(".weight")
        scale = stored[f"{module}.weight_scale"]
        wide = {**stored, f"{module}.weight_scale": scale.float()}
        error = (decode_compressed_tensors(wide, module, 8).double() - expected).abs()
        highest = expected.view(scale.shape[0], -1, GROUP).abs().amax(-1)
        allowed = torch.maximum(scale.double() * 0.501, highest - 127 * scale.double())
        assert bool((error <= allowed.repeat_interleave(GROUP, 1)).all()), name


@pytest.mark.parametrize("kind", ["kimi", "awq", "gptq v1 desc_act"])
def test_partners_in_other_files(tmp_path: Path, kind: str):
    model = MODELS[kind]()
    suffixes = ("weight_scale", "weight_shape", "scales", "qzeros", "g_idx")
    apart = model.write(tmp_path / "apart", split=suffixes)
    assert len(list(apart.glob("*.safetensors"))) == 2
    found = decoded(apart, group_size=GROUP)
    assert all(torch.equal(w, model.expected[name].float()) for name, w in found.items())


@pytest.mark.parametrize("kind", ["kimi", "awq", "gptq v2", "gptq v1 desc_act"])
def test_tiles_do_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    from quantconvert.planning import memory

    source = MODELS[kind]().write(tmp_path / "model")
    options: dict[str, Any] = {"bits": 4, "group_size": GROUP, "format": "gptq", "requantize": True}
    quantconvert.convert(source, tmp_path / "whole", **options)
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 1500)
    monkeypatch.setattr(memory, "MAX_SLAB_NBYTES", 3000)
    quantconvert.convert(source, tmp_path / "tiled", **options)
    one, other = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "tiled")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_kimi_keeps_what_it_left_alone(tmp_path: Path):
    model = kimi_model()
    source = model.write(tmp_path / "model")
    result = quantconvert.convert(source, tmp_path / "out", bits=8, group_size=GROUP, format="compressed-tensors")
    assert {task.source.name for task in result.plan.quantized} == set(model.expected)
    reasons = {task.source.name: task.reason for task in result.plan.kept}
    found = read_tensors(tmp_path / "out")
    for name in (name for name in model.tensors if "self_attn" in name):
        assert reasons[name] == "plain"
        assert torch.equal(found[name], model.tensors[name])


def test_our_own_kimi_is_read_back(tmp_path: Path):
    """The same from our own writer: experts in int4, the rest ignored."""
    plain = Model(plain_rest(64) | attention(), config("toy_dense"))
    for e in range(3):
        for i, (projection, shape) in enumerate(
            (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
        ):
            plain.tensors[f"{LAYER}.mlp.experts.{e}.{projection}.weight"] = weight(*shape, seed=10 * e + i)
    options: dict[str, Any] = {"scheme": "W4A16:g32", "format": "compressed-tensors", "ignore": ["*.self_attn.*"]}
    result = quantconvert.convert(plain.write(tmp_path / "plain"), tmp_path / "coded", **options)
    stored = read_tensors(tmp_path / "coded")
    wide = {name: t.float() if name.endswith("scale") else t for name, t in stored.items()}
    found = decoded(tmp_path / "coded", bits=8, group_size=GROUP)
    assert set(found) == {task.source.name for task in result.plan.quantized}
    for name, w in found.items():
        assert torch.equal(w, decode_compressed_tensors(wide, name.removesuffix(".weight"), 4)), name
