"""What a decoder layer computes, as data: enough to push vectors through it without the model's class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# rms: x / sqrt(mean x^2 + eps). layer: the mean is taken away first. Times the weight, or times 1 + weight; plus a
# bias where one is stored.
NormKind = Literal["rms", "1 + rms", "layer", "1 + layer"]


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not `gated`.

    inner: the modules of gate and up, or the one that holds the rows of both, the gate's first. Names are relative to
    the layer, `N` is an expert's number.
    """

    inner: tuple[str, ...]
    down: str
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts: each token goes to those with the largest softmax of `router`, which weigh what they give.

    top_k: the config key of how many. normalized: the config key that says whether their weights are made to sum to
    one; None: always. shared: an MLP that every token passes as well, times sigmoid(shared_gate) where there is one.
    """

    router: str
    each: Mlp
    top_k: str
    normalized: str | None = None
    shared: Mlp | None = None
    shared_gate: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of decoder layer, and what goes into the first.

    x = x + s post(o(attention(v(norm(x))))), then x = x + s post(mlp(norm(x))), with s the value of
    `residual_multiplier`; with `parallel` both halves read the same norm of the same x. Layers that have the router are
    `experts`, others `mlp`. Names are relative to the layer, but for `embeddings`, beside whose module the layers lie.

    model_types: that this holds for. qkv: the modules that read what attention reads; values are the last rows of the
    last. attention_norm, mlp_norm: None where the stream itself is read. attention_post, mlp_post: norms of what is
    added. activation, eps, embedding_multiplier, residual_multiplier: config keys. embedding_sqrt: embeddings are
    multiplied by the root of their width. defaults: what config.json need not say. only_with: a config key, and the
    values with which models are built like this; with others they are not.
    """

    model_types: tuple[str, ...]
    defaults: tuple[tuple[str, object], ...]
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    mlp: Mlp | None = Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    experts: Experts | None = None
    norm: NormKind = "rms"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post: str | None = None
    mlp_post: str | None = None
    parallel: bool = False
    activation: str = "hidden_act"
    eps: str = "rms_norm_eps"
    embeddings: str = "embed_tokens"
    layers: str = "layers"
    embedding_sqrt: bool = False
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    only_with: tuple[str, tuple[object, ...]] | None = None
