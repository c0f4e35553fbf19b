"""What decoder layers compute, by model type. Read in transformers' model files, defaults in its config classes."""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.block import Block, Experts, Mlp

UNGATED = Mlp(("mlp.up_proj",), "mlp.down_proj", gated=False)
FUSED = Mlp(("mlp.gate_up_proj",), "mlp.down_proj")


def _llama(*model_types: str, eps: float = 1e-6, activation: str = "silu") -> Block:
    return Block(model_types, (("rms_norm_eps", eps), ("hidden_act", activation)))


_LAYER_NORM = replace(
    _llama("jais2"),
    defaults=(("layer_norm_eps", 1e-5), ("hidden_act", "relu2")),
    norm="layer",
    eps="layer_norm_eps",
    mlp=UNGATED,
)
_STABLELM = replace(
    _LAYER_NORM,
    model_types=("stablelm",),
    defaults=(("layer_norm_eps", 1e-5), ("hidden_act", "silu"), ("use_parallel_residual", False)),
    mlp=_llama().mlp,
)
_GEMMA = replace(_llama("gemma", activation="gelu_pytorch_tanh"), norm="1 + rms", embedding_sqrt=True)
_GEMMA2 = replace(
    _GEMMA,
    model_types=("gemma2", "gemma3_text"),
    defaults=(
        ("rms_norm_eps", 1e-6), ("hidden_activation", "gelu_pytorch_tanh"), ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
    ),
    activation="hidden_activation",
    attention_post="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post="post_feedforward_layernorm",
)  # fmt: skip
_MULTIPLIERS = (("embedding_multiplier", 1.0), ("residual_multiplier", 1.0))
_GRANITE = replace(
    _llama("granite"),
    defaults=(*_llama().defaults, *_MULTIPLIERS),
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
)

LLAMA_BLOCKS = (
    _llama("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss", "qwen3_vl_text"),
    _llama("ministral3", "cwm", "hunyuan_v1_dense", "ernie4_5", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl",
           "qwen2_5_vl_text", eps=1e-5),
    _llama("helium", eps=1e-8),
    replace(_llama("arcee", eps=1e-5, activation="relu2"), mlp=UNGATED),
    _GRANITE,
    replace(
        _llama("olmo2", "olmo3", "exaone4", eps=1e-5),
        attention_norm=None,
        mlp_norm=None,
        attention_post="post_attention_layernorm",
        mlp_post="post_feedforward_layernorm",
    ),
    _GEMMA,
    _GEMMA2,
    replace(_GEMMA2, model_types=("vaultgemma",), attention_post=None, mlp_post=None),
    replace(
        _LAYER_NORM,
        model_types=("cohere", "cohere2"),
        defaults=(("layer_norm_eps", 1e-5), ("hidden_act", "silu")),
        mlp=_llama().mlp,
        mlp_norm=None,
        parallel=True,
    ),
    replace(_STABLELM, only_with=("use_parallel_residual", (False,))),
    replace(_STABLELM, mlp_norm=None, parallel=True, only_with=("use_parallel_residual", (True,))),
    replace(
        _LAYER_NORM,
        model_types=("nemotron",),
        defaults=(("norm_eps", 1e-5), ("hidden_act", "relu2")),
        norm="1 + layer",
        eps="norm_eps",
    ),
    _LAYER_NORM,
)  # fmt: skip

PHI3_BLOCKS = (replace(_llama("phi3", eps=1e-5), qkv=("self_attn.qkv_proj",), mlp=FUSED),)

_GLM = replace(_llama("glm", eps=1.5625e-7), mlp=FUSED)
GLM_BLOCKS = (
    _GLM,
    replace(_GLM, model_types=("glm4",), attention_post="post_self_attn_layernorm", mlp_post="post_mlp_layernorm"),
)


def _gated(stem: str) -> Mlp:
    return Mlp((f"{stem}.gate_proj", f"{stem}.up_proj"), f"{stem}.down_proj")


_EXPERTS = Experts("mlp.gate", _gated("mlp.experts.N"), "num_experts_per_tok", normalized="norm_topk_prob")
_SHARED = replace(_EXPERTS, shared=_gated("mlp.shared_expert"), shared_gate="mlp.shared_expert_gate")
_NOT_NORMALIZED = (*_llama().defaults, ("norm_topk_prob", False))

QWEN_MOE_BLOCKS = (
    replace(_llama("qwen2_moe"), defaults=(*_NOT_NORMALIZED, ("num_experts_per_tok", 4)), experts=_SHARED),
    replace(_llama("qwen3_moe"), defaults=(*_NOT_NORMALIZED, ("num_experts_per_tok", 8)), experts=_EXPERTS),
)
OLMOE_BLOCKS = (
    replace(
        _llama("olmoe"),
        defaults=(
            ("rms_norm_eps", 1e-5), ("hidden_act", "silu"), ("norm_topk_prob", False), ("num_experts_per_tok", 8),
            ("clip_qkv", None),
        ),
        mlp=None,
        experts=_EXPERTS,
        only_with=("clip_qkv", (None,)),
    ),
)  # fmt: skip
MIXTRAL_BLOCKS = (
    replace(
        _llama("mixtral"),
        defaults=(*_llama(eps=1e-5).defaults, ("num_experts_per_tok", 2)),
        mlp=None,
        experts=Experts(
            "block_sparse_moe.gate",
            Mlp(("block_sparse_moe.experts.N.w1", "block_sparse_moe.experts.N.w3"), "block_sparse_moe.experts.N.w2"),
            "num_experts_per_tok",
        ),
    ),
)

# The softmax of the chosen logits is that of all, made to sum to one.
_GRANITE_MOE = replace(
    _GRANITE,
    model_types=("granitemoe", "granitemoeshared"),
    defaults=(*_GRANITE.defaults, ("num_experts_per_tok", 2)),
    mlp=None,
    experts=Experts(
        "block_sparse_moe.router.layer",
        _gated("block_sparse_moe.experts.N"),
        "num_experts_per_tok",
        shared=Mlp(("shared_mlp.input_linear",), "shared_mlp.output_linear"),
    ),
)
GRANITE_MOE_BLOCKS = (_GRANITE_MOE,)
