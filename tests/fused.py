"""Where families keep the experts of a layer in one 3-D tensor, and checkpoints of such."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from tests.builders import weight

E, H, I = 3, 64, 96  # noqa: E741
TEXT = {"hidden_size": H, "num_hidden_layers": 1, "tie_word_embeddings": False}
LOCAL = TEXT | {"num_local_experts": E, "intermediate_size": I}
ROUTED = TEXT | {"num_experts": E, "moe_intermediate_size": I, "intermediate_size": 7}


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its experts, and how `gate`, `up` and `down` [out, in] are cut from one expert's matrix."""

    config: dict[str, Any]
    gate_up: str
    down: str
    experts: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    gate: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    to_down: Callable[[Tensor], Tensor]


def plain(config: dict[str, Any], gate_up: str, down: str, experts: str) -> Layout:
    shapes = ((E, 2 * I, H), (E, H, I))
    return Layout(config, gate_up, down, experts, shapes, lambda m: m[:I], lambda m: m[I:], lambda m: m)


def transposed(config: dict[str, Any], stem: str) -> Layout:
    shapes = ((E, H, 2 * I), (E, I, H))
    names = (f"{stem}.gate_up_proj", f"{stem}.down_proj", stem)
    return Layout(config, *names, shapes, lambda m: m[:, :I].T, lambda m: m[:, I:].T, lambda m: m.T)


LAYER = "model.layers.0"
GRANITE = f"{LAYER}.block_sparse_moe"
TEXT_LAYER = "model.language_model.layers.0.mlp.experts"
LLAMA4 = "language_model.model.layers.0.feed_forward.experts"
LAYOUTS = {
    "granite": plain(
        LOCAL | {"model_type": "granitemoe"},
        f"{GRANITE}.input_linear.weight", f"{GRANITE}.output_linear.weight", f"{GRANITE}.experts",
    ),
    "qwen3_5_moe": plain(
        {"model_type": "qwen3_5_moe", "text_config": ROUTED | {"model_type": "qwen3_5_moe_text"}},
        f"{TEXT_LAYER}.gate_up_proj", f"{TEXT_LAYER}.down_proj", TEXT_LAYER,
    ),
    "qwen3_vl_moe": transposed(
        {"model_type": "qwen3_vl_moe", "text_config": ROUTED | {"model_type": "qwen3_vl_moe_text"}}, TEXT_LAYER,
    ),
    "qwen3_vl_moe, saved by transformers 5": plain(
        {"model_type": "qwen3_vl_moe", "text_config": LOCAL | {"moe_intermediate_size": I, "intermediate_size": 7}},
        f"{TEXT_LAYER}.gate_up_proj", f"{TEXT_LAYER}.down_proj", TEXT_LAYER,
    ),
    "llama4": transposed({"model_type": "llama4", "text_config": LOCAL | {"model_type": "llama4_text"}}, LLAMA4),
    "gpt_oss": Layout(
        LOCAL | {"model_type": "gpt_oss"},
        f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj", f"{LAYER}.mlp.experts",
        ((E, H, 2 * I), (E, I, H)),
        lambda m: m[:, 0::2].T, lambda m: m[:, 1::2].T, lambda m: m.T,
    ),
}  # fmt: skip
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def fused_tensors(layout: Layout) -> dict[str, Tensor]:
    """Gate ten times as large as up; and experts of different sizes, too."""
    gate_up, down = (weight(*shape, seed=i) for i, shape in enumerate(layout.shapes))
    for e in range(E):
        layout.gate(gate_up[e]).mul_(10)
        gate_up[e] *= 1 + e
    return {"model.embed_tokens.weight": weight(8, H), layout.gate_up: gate_up, layout.down: down}
