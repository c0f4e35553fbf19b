"""A bag of tokens computes what transformers computes, in every family whose layers are in a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import quantconvert
from quantconvert.factors.draws import Draws
from quantconvert.families import FAMILIES, Block
from tests.bags import importances
from tests.engines.dense_families import CASES as DENSE
from tests.engines.dense_families import GROUPED
from tests.engines.families import Case
from tests.engines.moe_families import CASES as MOE
from tests.engines.moe_families import FUSED
from tests.engines.multimodal_families import CASES as MULTIMODAL

BLOCKS = list(dict.fromkeys(block for family in FAMILIES for block in family.blocks))
TYPES = sorted({model_type for block in BLOCKS for model_type in block.model_types})
PICKED = (
    "llama", "llama tied", "llama biases", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "granite", "smollm3", "seed_oss", "exaone4", "olmo2", "olmo3", "stablelm", "cohere", "cohere2", "helium",
    "hunyuan_v1_dense", "ernie4_5", "cwm", "vaultgemma", "nemotron", "arcee", "jais2", "phi3", "glm", "glm4",
)  # fmt: skip
CASES: dict[str, Case] = {
    **{name: DENSE[name] for name in PICKED},
    **{name: MOE[name] for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")},
    **{name: FUSED[name].case for name in ("granitemoe", "granitemoeshared")},
    **{f"{name} with a tower": MULTIMODAL[name] for name in ("llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    "ministral": Case("MinistralForCausalLM", GROUPED | {"head_dim": 16}, (), {}),
    "stablelm parallel": Case("StableLmForCausalLM", GROUPED | {"use_parallel_residual": True}, (), {}),
    "granite multiplied": Case(
        "GraniteForCausalLM", GROUPED | {"embedding_multiplier": 3.0, "residual_multiplier": 0.3}, (), {}
    ),
    "qwen3_moe normalized": Case(MOE["qwen3_moe"].model, MOE["qwen3_moe"].config | {"norm_topk_prob": True}, (), {}),
    "gelu": Case("LlamaForCausalLM", GROUPED | {"hidden_act": "gelu"}, (), {}),
    "relu": Case("LlamaForCausalLM", GROUPED | {"hidden_act": "relu"}, (), {}),
}  # fmt: skip
# What the experts' last projections are called where it is not as in most.
DOWN = {
    "mixtral": "block_sparse_moe.experts.{}.w2",
    "granitemoe": "block_sparse_moe.experts.{}.down_proj",
    "granitemoeshared": "block_sparse_moe.experts.{}.down_proj",
}
ALONE = Draws(alone=True)


def build(case: Case, folder: Path) -> Any:
    """A model in which every parameter counts, and its folder."""
    torch.manual_seed(0)
    model_class = getattr(transformers, case.model)
    model = model_class(model_class.config_class(**case.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def layer_part(name: str) -> str:
    """`layers.3.mlp.down_proj`: the name as every prefix has it."""
    return re.sub(r"^.*?(?=layers\.\d+\.)", "", name)


@contextmanager
def listening(model: Any, down: str) -> Iterator[dict[str, Tensor]]:
    """Mean squares of the inputs of the language model's linear modules, filled in by its next call."""
    found: dict[str, Tensor] = {}
    hooks = []

    def linear(name: str) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            found[name] = given[0].flatten(0, -2).double().square().mean(0).float()

        return hook

    def experts(name: str) -> Any:
        def hook(module: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
            x, chosen, _ = given
            for number in range(len(module.gate_up_proj)):
                mine = x[(chosen == number).any(-1)]
                assert len(mine) >= 16
                gate, up = (mine @ module.gate_up_proj[number].t()).chunk(2, -1)
                inner = module.act_fn(gate) * up
                found[f"{name}.{down.format(number)}"] = inner.square().mean(0)

        return hook

    for name, module in model.get_decoder().named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(linear(layer_part(name))))
        elif type(module).__name__.endswith("Experts"):
            part = re.match(r"layers\.\d+", layer_part(name))
            assert part
            hooks.append(module.register_forward_pre_hook(experts(part[0])))
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", CASES)
def test_a_token_alone_is_what_transformers_computes(name: str, tmp_path: Path):
    """A sequence of one token attends to itself, whatever its queries and keys are."""
    case = CASES[name]
    model = build(case, tmp_path)
    ids = torch.tensor(ALONE.ids(model.get_input_embeddings().weight.shape[0]))[:, None]
    with listening(model, DOWN.get(name, "mlp.experts.{}.down_proj")) as expected, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = importances(tmp_path, ALONE)
    parts = {layer_part(module): h for module, h in found.items()}
    assert len(parts) == len(found)
    heard = {part: parts[part] for part in expected}
    torch.testing.assert_close(heard, expected, rtol=1e-4, atol=1e-7)
    plan = quantconvert.plan(tmp_path, group_size=32)
    assert {task.source.module for task in plan.quantized} <= set(found)


def test_every_table_is_tried():
    tried = {
        model_type
        for case in CASES.values()
        for config in [getattr(transformers, case.model).config_class(**case.config)]
        for model_type in (config.model_type, config.get_text_config().model_type)
    }
    aliases = {"qwen2_vl", "qwen2_5_vl"}  # of configs without a `text_config`, as the Hub has them
    assert set(TYPES) - aliases <= tried


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.model_types[0])
def test_defaults_are_those_of_config_classes(block: Block):
    for model_type in block.model_types:
        config = transformers.CONFIG_MAPPING[model_type]().get_text_config()
        for key, value in block.defaults:
            assert getattr(config, key) == value, (model_type, key)


def test_experts_that_few_tokens_reach_are_asked_all_the_same(tmp_path: Path):
    """A router that sends nearly every token to two of four experts: the others tell of the 16 that suit them best."""
    case = MOE["qwen3_moe"]
    model = build(Case(case.model, case.config | {"num_experts_per_tok": 1}, (), {}), tmp_path)
    mlp = model.get_decoder().layers[1].mlp
    with torch.no_grad():
        mlp.gate.weight[0] = 10 * torch.randn(64)
        mlp.gate.weight[1] = -mlp.gate.weight[0]
    model.save_pretrained(tmp_path)
    seen: list[Tensor] = []
    mlp.experts.register_forward_pre_hook(lambda _, given: seen.extend(given[:2]))
    ids = torch.tensor(ALONE.ids(96))[:, None]
    with torch.no_grad():
        model(input_ids=ids)
    x, chosen = seen
    liked = (x @ mlp.gate.weight.t()).softmax(-1)
    found = importances(tmp_path, ALONE)
    few = 0
    for number in range(4):
        mine = (chosen == number).any(-1)
        few += int(mine.sum()) < 16
        order = liked[:, number].masked_fill(mine, 2.0).argsort(descending=True)
        tokens = x[order[: max(16, int(mine.sum()))]]
        gate, up = (tokens @ mlp.experts.gate_up_proj[number].t()).chunk(2, -1)
        h = (torch.nn.functional.silu(gate) * up).square().mean(0)
        torch.testing.assert_close(
            found[f"model.layers.1.mlp.experts.{number}.down_proj"], h.detach(), rtol=1e-4, atol=1e-8
        )
    assert few == 2
