"""Folds that families share: who gives and who reads the vectors inside a layer.

Read in transformers' model files. Only vectors that nothing but weights read are here: not what a norm also hands on as
the residual, not what passes a clamp, an activation or another norm on its way.
"""

from __future__ import annotations

from dataclasses import replace

from quantconvert.families.row import Fold, FoldKind


def under(stem: str, *names: str) -> tuple[str, ...]:
    """Each of `names` after `stem`."""
    return tuple(f"{stem}.{name}" for name in names)


def gated(*stems: str, up: str = "up_proj", down: str = "down_proj") -> tuple[Fold, ...]:
    """In MLPs that multiply what `up` gives by an activation of the gate, before `down`."""
    return tuple(Fold(f"{stem}.{up}", (f"{stem}.{down}",), "rows") for stem in stems)


def only(model_types: tuple[str, ...], *folds: Fold) -> tuple[Fold, ...]:
    """`folds` of these model types alone."""
    return tuple(replace(fold, only=model_types) for fold in folds)


QKV = under("self_attn", "q_proj", "k_proj", "v_proj")
MLP_IN = under("mlp", "gate_proj", "up_proj")
# OLMo and OLMoE may clamp what q, k and v give.
FOLD_V = Fold("self_attn.v_proj", ("self_attn.o_proj",), "rows", heads=True, where=("clip_qkv", (None,)))
FOLD_UP = gated("mlp")[0]
# What no norm feeds, whether or not a fold holds that speaks of it.
OUTS = (r"(^|\.)(o_proj|down_proj)$",)


def pre_norm(
    *mlp: str, attention: tuple[str, ...] = QKV, kind: FoldKind = "norm", second: str = "post_attention_layernorm"
) -> tuple[Fold, Fold]:
    """A norm in front of the attention and one, `second`, in front of the MLP, whose readers are `mlp`."""
    return Fold("input_layernorm", attention, kind), Fold(second, mlp or MLP_IN, kind)


# Routed experts, shared ones under both names, the router and the gate of a shared expert; or a dense MLP.
EXPERT_STEMS = ("mlp", "mlp.experts.N", "mlp.shared_expert", "mlp.shared_experts")
READ_BY_EXPERTS = (
    *under("mlp", "gate", "shared_expert_gate"),
    *(name for stem in EXPERT_STEMS for name in under(stem, "gate_proj", "up_proj")),
)
FOLDS_UP_EXPERTS = gated(*EXPERT_STEMS)
FOLDS_EXPERTS = (*pre_norm(*READ_BY_EXPERTS), FOLD_V, *FOLDS_UP_EXPERTS)

# The layers of BART and OPT. fc1 and fc2 have an activation and no gate between them; keys and values of
# cross-attention come from an encoder, whose output others read as well.
FC_NORMS = (
    Fold("self_attn_layer_norm", QKV),
    Fold("encoder_attn_layer_norm", ("encoder_attn.q_proj",)),
    Fold("final_layer_norm", ("fc1",)),
)
FC_VALUES = tuple(Fold(f"{stem}.v_proj", (f"{stem}.out_proj",), "rows") for stem in ("self_attn", "encoder_attn"))
FC_UNFOLDED = (r"\.out_proj$", r"^fc2$", r"^encoder_attn\.(k_proj|v_proj)$")
