"""Checkpoints of integer codes in the words of compressed-tensors, GPTQ and AWQ, all packed here by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.builders import AWQ_ORDER, weight
from tests.inputs import LAYER, SHAPES, Model, attention, config, plain_rest

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
    """Experts in compressed-tensors' words, packed here (`engines/test_inputs.py` shows them to its own
    library); attention in bfloat16.
    """
    model = Model(plain_rest(64) | attention(), config("toy_dense", quantization_config=kimi_config()))
    for e in range(3):
        for i, (projection, shape) in enumerate(
            (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
        ):
            name = f"{LAYER}.mlp.experts.{e}.{projection}"
            w = weight(*shape, seed=10 * e + i).double()
            scale = (w.view(shape[0], -1, GROUP).abs().amax(-1) / 7.5).to(torch.bfloat16)
            wide = scale.double().repeat_interleave(GROUP, 1)
            codes = (w / wide).round().clamp(-8, 7)
            model.tensors |= {
                f"{name}.weight_packed": pack_words(codes + 8, in_order(4)),
                f"{name}.weight_scale": scale,
                f"{name}.weight_shape": torch.tensor(shape),
            }
            model.expected[f"{name}.weight"] = codes * wide
    return model
