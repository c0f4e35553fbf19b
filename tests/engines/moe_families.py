"""Mixtures of experts and hybrids: tiny models, what must happen to each weight, and experts taken apart.

Expectations are literal templates. The fused experts of the Hub are taken apart here with plain slices, so that what a
conversion makes of the fused tensors can be compared with what it makes of the parts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.checkpoint import LocalFolder, load_checkpoint
from quantconvert.families import find_family
from quantconvert.patterns import template_of
from tests.builders import read_tensors, write_checkpoint
from tests.engines.families import Case, each

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
MOE = TEXT | {"num_experts": 4, "moe_intermediate_size": 96, "intermediate_size": 160}
SHARED = MOE | {"shared_expert_intermediate_size": 128}
LOCAL = TEXT | {"num_local_experts": 4}
ROUTED = TEXT | {"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
LATENT = ROUTED | {
    "num_key_value_heads": 4, "head_dim": 16, "n_group": 2, "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
# the first layer keeps a state, the second attends
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA = {
    "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_n_groups": 1,
}  # fmt: skip
# Towers have odd sizes, so that a rule that took one for a layer to quantize would fail.
QWEN_EYE = {
    "depth": 1, "hidden_size": 40, "intermediate_size": 72, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
LLAMA4_EYE = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48,
}  # fmt: skip

GATED = ("gate_proj", "up_proj", "down_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
UNTIED = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "lm_head"}


def layer(attention: tuple[str, ...] = QKVO, root: str = "model", **parts: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of all layers: of `self_attn`, then of every part, `__` in its name for a dot."""
    stem = f"{root}.layers.N"
    named = [each(f"{stem}.{part.replace('__', '.')}", *names) for part, names in parts.items()]
    return sum(named, each(f"{stem}.self_attn", *attention))


def kept(*names: str, reason: str, root: str = "model.layers.N") -> dict[str, str]:
    return {f"{root}.{name}": reason for name in names}


GATE = kept("mlp.gate.weight", reason="router")
TWO_GATES = kept("mlp.gate.weight", "mlp.shared_expert_gate.weight", reason="router")
LATENTS = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
NO_QUERY = kept("self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight", reason="family")
MLA = NO_QUERY | kept("self_attn.q_a_proj.weight", reason="family")
INDEXER = kept(*(f"self_attn.indexer.{name}.weight" for name in ("wq_b", "wk", "weights_proj")), reason="family")
CONV = kept("linear_attn.conv1d.weight", reason="conv")
QWEN35_STATE = kept("linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight", reason="state-space") | CONV
QWEN35_DELTA = ("in_proj_qkv", "in_proj_z", "out_proj")
QWEN_VISION = {
    f"model.visual.{name}.weight": "vision"
    for name in (
        "blocks.N.attn.proj", "blocks.N.attn.qkv", "blocks.N.mlp.linear_fc1", "blocks.N.mlp.linear_fc2",
        "merger.linear_fc1", "merger.linear_fc2", "patch_embed.proj", "pos_embed",
    )
}  # fmt: skip
LLAMA4_VISION = {f"vision_model.model.layers.N.self_attn.{name}.weight": "vision" for name in QKVO} | {
    f"{name}.weight": "vision"
    for name in (
        "vision_model.model.layers.N.mlp.fc1", "vision_model.model.layers.N.mlp.fc2",
        "vision_model.patch_embedding.linear", "vision_model.vision_adapter.mlp.fc1",
        "vision_model.vision_adapter.mlp.fc2", "multi_modal_projector.linear_1",
    )
} | {"vision_model.positional_embedding_vlm": "vision"}  # fmt: skip
GRANITE_ROUTER = kept("block_sparse_moe.router.layer.weight", reason="router")
SHARED_MLP = ("input_linear", "output_linear")


def inside(root: str, expected: dict[str, str]) -> dict[str, str]:
    """The same expectations where the language model lies at `root` and its head beside it."""
    return {name.replace("model.", f"{root}.", 1) if name[:6] == "model." else name: r for name, r in expected.items()}


CASES = {
    "mixtral": Case(
        "MixtralForCausalLM", LOCAL, layer(block_sparse_moe__experts__N=("w1", "w2", "w3")),
        UNTIED | kept("block_sparse_moe.gate.weight", reason="router"),
    ),
    "qwen2_moe": Case(
        "Qwen2MoeForCausalLM", SHARED | {"mlp_only_layers": [0]},
        layer(mlp=GATED, mlp__experts__N=GATED, mlp__shared_expert=GATED), UNTIED | TWO_GATES,
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM", MOE | {"mlp_only_layers": [0]}, layer(mlp=GATED, mlp__experts__N=GATED), UNTIED | GATE,
    ),
    "olmoe": Case(
        "OlmoeForCausalLM", TEXT | {"num_experts": 4, "head_dim": 16}, layer(mlp__experts__N=GATED), UNTIED | GATE,
    ),
    "deepseek_v2": Case(
        "DeepseekV2ForCausalLM", LATENT | {"q_lora_rank": None},
        layer(("q_proj", "o_proj"), mlp=GATED, mlp__experts__N=GATED, mlp__shared_experts=GATED),
        UNTIED | GATE | NO_QUERY,
    ),
    "deepseek_v3": Case(
        "DeepseekV3ForCausalLM", LATENT,
        layer(("q_b_proj", "o_proj"), mlp=GATED, mlp__experts__N=GATED, mlp__shared_experts=GATED),
        UNTIED | GATE | MLA,
    ),
    "deepseek_v32": Case(
        "DeepseekV32ForCausalLM", LATENT | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
        layer(("q_b_proj", "o_proj"), mlp=GATED, mlp__experts__N=GATED, mlp__shared_experts=GATED),
        UNTIED | GATE | MLA | INDEXER,
    ),
    "glm4_moe": Case(
        "Glm4MoeForCausalLM", ROUTED | {"use_qk_norm": True},
        layer(mlp=GATED, mlp__experts__N=GATED, mlp__shared_experts=GATED), UNTIED | GATE,
    ),
    "glm_moe_dsa": Case(
        "GlmMoeDsaForCausalLM",
        LATENT | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "mlp_layer_types": ["dense", "sparse"]},
        layer(("q_b_proj", "o_proj"), mlp=GATED, mlp__experts__N=GATED, mlp__shared_experts=GATED),
        UNTIED | GATE | MLA | INDEXER,
    ),
    "glm4_moe_lite": Case(
        "Glm4MoeLiteForCausalLM", LATENT | {"mlp_layer_types": ["dense", "sparse"]},
        layer(("q_b_proj", "o_proj"), mlp=GATED, mlp__experts__N=GATED, mlp__shared_experts=GATED),
        UNTIED | GATE | MLA,
    ),
    "longcat_flash": Case(
        "LongcatFlashForCausalLM",
        LATENT | {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 64, "zero_expert_num": 0,
                  "moe_topk": 2},
        each("model.layers.N.self_attn.N", "q_b_proj", "o_proj") + each("model.layers.N.mlps.N", *GATED)
        + each("model.layers.N.mlp.experts.N", *GATED),
        UNTIED | kept("mlp.router.classifier.weight", reason="router")
        | kept(*(f"self_attn.N.{name}.weight" for name in LATENTS), reason="family"),
    ),
    "nemotron_h": Case(
        "NemotronHForCausalLM",
        {k: v for k, v in TEXT.items() if k != "num_hidden_layers"} | {
            "layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_routed_experts": 4, "mamba_num_heads": 8,
            "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "moe_latent_size": 32,
            "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 128,
        },
        each("backbone.layers.N.mixer", "in_proj", "out_proj", *QKVO, "up_proj", "down_proj", "experts.N.up_proj",
             "experts.N.down_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
        {"backbone.embeddings.weight": "embedding", "lm_head.weight": "lm_head"}
        | kept("gate.weight", reason="router", root="backbone.layers.N.mixer")
        | kept("fc1_latent_proj.weight", "fc2_latent_proj.weight", reason="family", root="backbone.layers.N.mixer")
        | kept("conv1d.weight", reason="conv", root="backbone.layers.N.mixer"),
    ),
    "lfm2_moe": Case(
        "Lfm2MoeForCausalLM",
        {k: v for k, v in MOE.items() if k != "head_dim"}
        | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "tie_word_embeddings": True},
        each("model.layers.N.self_attn", "q_proj", "k_proj", "v_proj", "out_proj")
        + each("model.layers.N.conv", "in_proj", "out_proj") + each("model.layers.N.feed_forward", "w1", "w2", "w3")
        + each("model.layers.N.feed_forward.experts.N", "w1", "w2", "w3"),
        {"model.embed_tokens.weight": "embedding"} | kept("feed_forward.gate.weight", reason="router")
        | kept("conv.conv.weight", reason="conv"),
    ),
    "qwen3_next": Case(
        "Qwen3NextForCausalLM", SHARED | DELTA | {"mlp_only_layers": [0]},
        layer(linear_attn=("in_proj_qkvz", "out_proj"), mlp=GATED, mlp__experts__N=GATED, mlp__shared_expert=GATED),
        UNTIED | TWO_GATES | CONV | kept("linear_attn.in_proj_ba.weight", reason="state-space"),
    ),
    "qwen3_5_text": Case(
        "Qwen3_5ForCausalLM", TEXT | DELTA, layer(linear_attn=QWEN35_DELTA, mlp=GATED), UNTIED | QWEN35_STATE,
    ),
    "qwen3_5": Case(
        "Qwen3_5ForConditionalGeneration",
        {"text_config": TEXT | DELTA, "vision_config": QWEN_EYE, "tie_word_embeddings": False},
        layer(root="model.language_model", linear_attn=QWEN35_DELTA, mlp=GATED),
        inside("model.language_model", UNTIED | QWEN35_STATE) | QWEN_VISION,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fused:
    """A family whose Hub checkpoints hold all experts of a layer in one tensor, which ends in one of `fused`.

    `case` is the same model with an expert a tensor, as engines read it once quantized.
    """

    case: Case
    gate_up: str
    down: str
    stem: str
    transposed: bool = False
    interleaved: bool = False


QWEN3_VL_MOE = Case(
    "Qwen3VLMoeForConditionalGeneration",
    {"text_config": MOE | {"mlp_only_layers": [0]}, "vision_config": QWEN_EYE | {"deepstack_visual_indexes": [0]},
     "tie_word_embeddings": False},
    layer(root="model.language_model", mlp=GATED, mlp__experts__N=GATED),
    inside("model.language_model", UNTIED | GATE) | QWEN_VISION
    | {f"model.visual.deepstack_merger_list.N.linear_fc{i}.weight": "vision" for i in (1, 2)},
)  # fmt: skip
FUSED = {
    "qwen3_5_moe": Fused(
        Case(
            "Qwen3_5MoeForConditionalGeneration",
            {"text_config": SHARED | DELTA, "vision_config": QWEN_EYE, "tie_word_embeddings": False},
            layer(root="model.language_model", linear_attn=QWEN35_DELTA, mlp__experts__N=GATED,
                  mlp__shared_expert=GATED),
            inside("model.language_model", UNTIED | QWEN35_STATE | TWO_GATES) | QWEN_VISION,
        ),
        ".experts.gate_up_proj", ".experts.down_proj", ".experts",
    ),
    "gpt_oss": Fused(
        Case(
            "GptOssForCausalLM", LOCAL, layer(mlp__experts__N=GATED),
            UNTIED | kept("mlp.router.weight", reason="router"),
        ),
        ".experts.gate_up_proj", ".experts.down_proj", ".experts", transposed=True, interleaved=True,
    ),
    "llama4": Fused(
        Case(
            "Llama4ForConditionalGeneration",
            {"text_config": LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 128,
                                     "interleave_moe_layer_step": 2},
             "vision_config": LLAMA4_EYE, "tie_word_embeddings": False},
            layer(root="language_model.model", feed_forward=GATED, feed_forward__experts__N=GATED,
                  feed_forward__shared_expert=GATED),
            {f"language_model.{name}": reason for name, reason in UNTIED.items()} | LLAMA4_VISION
            | {"language_model.model.layers.N.feed_forward.router.weight": "router"},
        ),
        ".experts.gate_up_proj", ".experts.down_proj", ".experts", transposed=True,
    ),
    "qwen3_vl_moe": Fused(
        QWEN3_VL_MOE, ".experts.gate_up_proj", ".experts.down_proj", ".experts", transposed=True,
    ),
    "qwen3_vl_moe, saved by transformers 5": Fused(
        QWEN3_VL_MOE, ".experts.gate_up_proj", ".experts.down_proj", ".experts",
    ),
    "granitemoe": Fused(
        Case("GraniteMoeForCausalLM", LOCAL, layer(block_sparse_moe__experts__N=GATED), UNTIED | GRANITE_ROUTER),
        ".input_linear.weight", ".output_linear.weight", ".experts",
    ),
    "granitemoeshared": Fused(
        Case(
            "GraniteMoeSharedForCausalLM", LOCAL | {"shared_intermediate_size": 128},
            layer(block_sparse_moe__experts__N=GATED, shared_mlp=SHARED_MLP), UNTIED | GRANITE_ROUTER,
        ),
        ".input_linear.weight", ".output_linear.weight", ".experts",
    ),
    "granitemoehybrid": Fused(
        Case(
            "GraniteMoeHybridForCausalLM", LOCAL | MAMBA | {"shared_intermediate_size": 128},
            layer(block_sparse_moe__experts__N=GATED, shared_mlp=SHARED_MLP, mamba=("in_proj", "out_proj")),
            UNTIED | GRANITE_ROUTER | kept("mamba.conv1d.weight", reason="conv"),
        ),
        ".input_linear.weight", ".output_linear.weight", ".experts",
    ),
}  # fmt: skip


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, out: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """The checkpoint of `folder` with other tensors, and another config if given."""
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return write_checkpoint(out, own, config or config_of(folder))


def hub_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-VL's on the Hub says `num_experts`, which transformers 5 renames when it saves."""
    if name == "qwen3_vl_moe":
        config["text_config"]["num_experts"] = config["text_config"].pop("num_local_experts")
    return config


def assert_dims(folder: Path) -> set[str]:
    """What the family's table reads of shapes from the config is what the model has. Returns the rows that applied."""
    checkpoint = load_checkpoint(LocalFolder(folder))
    family, config, found = find_family(checkpoint), checkpoint.text_config, set()
    assert family is not None
    for ref in checkpoint.tensors:
        for row in family.dims:
            if re.search(row.pattern, template_of(ref.name).removesuffix(".weight")):
                assert ref.shape == (config[row.out_features], config[row.in_features]), ref.name
                found.add(row.pattern)
    return found


def take_apart(family: Fused, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One matrix [out, in] an expert and projection; 3-D tensors are stored [E, out, in], or [E, in, out]."""
    found = {}
    for name, tensor in tensors.items():
        bias = name.endswith("_bias")
        stem = next((name.removesuffix(end) for end in ends(family, bias) if name.endswith(end)), None)
        if stem is None or (tensor.dim() != 3 and not bias):
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            rows = matrix.t() if family.transposed and not bias else matrix
            for projection, part in parts(family, rows, name.removesuffix("_bias").endswith(family.gate_up)):
                found[f"{stem}{family.stem}.{e}.{projection}.{'bias' if bias else 'weight'}"] = part
    return found


def ends(family: Fused, bias: bool) -> tuple[str, ...]:
    return tuple(end + "_bias" * bias for end in (family.gate_up, family.down))


def parts(family: Fused, rows: Tensor, gate_up: bool) -> list[tuple[str, Tensor]]:
    if not gate_up:
        return [("down_proj", rows)]
    half = len(rows) // 2
    gate, up = (rows[::2], rows[1::2]) if family.interleaved else (rows[:half], rows[half:])
    return [("gate_proj", gate), ("up_proj", up)]


def join(family: Fused, like: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `take_apart`: the tensors of `like` with values from the parts."""
    found = dict(tensors)
    for name, fused in like.items():
        bias = name.endswith("_bias")
        end = next((end for end in ends(family, bias) if name.endswith(end)), None)
        if end is None or (fused.dim() != 3 and not bias):
            continue
        stem, last = name.removesuffix(end) + family.stem, "bias" if bias else "weight"
        experts = []
        for e in range(len(fused)):
            projections = ("gate_proj", "up_proj") if end.startswith(family.gate_up) else ("down_proj",)
            rows = [found.pop(f"{stem}.{e}.{projection}.{last}") for projection in projections]
            matrix = torch.stack(rows, 1).flatten(0, 1) if family.interleaved and len(rows) > 1 else torch.cat(rows)
            experts.append(matrix.t() if family.transposed and not bias else matrix)
        found[name] = torch.stack(experts)
    return found


def hub_tensors(name: str, saved: Path) -> dict[str, Tensor]:
    """What `save_pretrained` wrote, with experts as the Hub has them: transformers 5 saves Qwen3.5's one by one, as
    Qwen3's, and Qwen3-VL's the other way round.
    """
    tensors = read_tensors(saved)
    if name == "qwen3_vl_moe":
        return {key: tensor.transpose(1, 2) if tensor.dim() == 3 else tensor for key, tensor in tensors.items()}
    if name != "qwen3_5_moe":
        return tensors
    stems = {key.split(".experts.")[0] for key in tensors if ".experts." in key}
    shapes = {"gate_up_proj": (4, 192, 64), "down_proj": (4, 64, 96)}
    like = {f"{stem}.experts.{fused}": torch.empty(shape) for stem in stems for fused, shape in shapes.items()}
    return join(FUSED[name], like, tensors)
