"""What a family table can say, and the vocabulary of reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from quantconvert.families.block import Block

# Why a weight is left alone: a closed list, so that reports and tests can count on it.
Reason = Literal[
    "embedding", "lm_head", "norm", "bias", "router", "vision", "audio", "conv", "state-space", "mtp", "head",
    "one-dimensional", "not 2-D", "not a weight", "family", "ignored", "indivisible", "unaligned", "non-finite",
    "plain",
]  # fmt: skip
REASONS: tuple[str, ...] = get_args(Reason)

REASON_TEXT: dict[str, str] = {
    "embedding": "embeddings are looked up, not multiplied",
    "lm_head": "output head; engines expect it in high precision",
    "norm": "normalisation",
    "bias": "bias",
    "router": "decides which expert runs; small and sensitive",
    "vision": "vision tower or projector",
    "audio": "audio tower",
    "conv": "convolution",
    "state-space": "state-space or linear-attention parameter",
    "mtp": "multi-token-prediction layer",
    "head": "outside the repeated layers (head, pooler or projection)",
    "one-dimensional": "one-dimensional",
    "not 2-D": "not a two-dimensional weight",
    "not a weight": "a buffer or table, not the weight of a linear layer",
    "family": "kept by the family's table",
    "ignored": "matches --ignore, or a rule that says skip",
    "indivisible": "group size does not divide in_features",
    "unaligned": "blocks of scales would reach over the end of a projection that engines load with others",
    "plain": "not quantized in the source",
    "non-finite": "holds NaN or Inf, or is fused with one that does (--nan-policy keep)",
}


@dataclass(frozen=True, slots=True)
class FusedSet:
    """Layers that engines load as one (`name`), so that all members must share a scheme."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """All routed experts of a layer in one 3-D tensor [E, rows, columns], as a family's Hub checkpoints hold them.

    `pattern` is searched in the tensor's name without `.weight`, and ends in `$`; what it matches is replaced by
    `.experts.<number>.<projection>`, the per-expert name that engines read. `projections`: what each expert's matrix
    holds, in order: one after the other, or row by row in turn (`interleaved`). `transposed`: each expert's matrix is
    stored [in, out]. `experts`, `out_features`, `in_features`: the config keys of the sizes, those of ONE projection;
    the tensor's shape must be what they say, which side is longer never decides. Of rows for one tensor the one whose
    `experts` key the config has is meant. `bias`: what follows the tensor's name
    in that of its biases [E, rows], in the same order.
    """

    pattern: str
    projections: tuple[str, ...]
    experts: str
    out_features: str
    in_features: str
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Dims:
    """What the config says of the shape [out_features, in_features] of the modules that `pattern` finds.

    Checked where the config has both keys.
    """

    pattern: str
    out_features: str
    in_features: str


@dataclass(frozen=True, slots=True)
class Part:
    """A module outside the layers that every checkpoint of a family has, under one of `names`, whatever stands before.

    `what` says it to people; what is a norm is asked for only where the layers have norms with weights. `unless`: a
    config key, and the values with which models have no such part. `only`: the end of the architecture's name that has
    it.
    """

    what: str
    names: tuple[str, ...]
    unless: tuple[str, tuple[object, ...]] | None = None
    only: str | None = None


FoldKind = Literal["norm", "1 + norm", "rows"]


@dataclass(frozen=True, slots=True)
class Fold:
    """One vector inside each layer: the module that gives it, and all that read it, so that factors can move between.

    Names are relative to the layer (`self_attn.v_proj`), numbers in them are `N` or meant as they stand. `readers`:
    every module that reads the vector, kept or not; `N` is the producer's own number where it has one, else every
    number. What `producer` gives is multiplied by a factor a channel, the readers' columns are divided by it:

    norm: its weight, and its bias where it has one. `1 + norm`: w becomes (1 + w) mu - 1. rows: the last rows of its
    weight and bias, as many as there are factors (all of v_proj; up in a fused gate_up; v in a fused q, k, v).

    `heads`: the readers' columns are query heads that share the producer's key-value heads; or, of a norm, heads that
    all share its weight. `only`: model types it holds for (the language model's own, where the config has one inside),
    all where empty. `unless`: a config key, and the values with which models are built otherwise; `where`: those
    without which. A key that the config has not counts as None, a dot in it leads inside. `head_dim`: the width of a
    head where the config says neither that nor how many there are, which is the model type's own.
    """

    producer: str
    readers: tuple[str, ...]
    kind: FoldKind = "norm"
    heads: bool = False
    only: tuple[str, ...] = ()
    unless: tuple[str, tuple[object, ...]] | None = None
    where: tuple[str, tuple[object, ...]] | None = None
    head_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Values:
    """What attention averages: the module that gives it, the one that reads it, head by head, and nothing between them
    but a weighted sum.

    head, before: the config keys of a head's size, and of the rows of `giver` that come before each head's own (MLA);
    None: the width of `reader` by the number of attention heads, and no such rows.
    """

    giver: str = "self_attn.v_proj"
    reader: str = "self_attn.o_proj"
    head: str | None = None
    before: str | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream of a decoder: one vector, from the embeddings to the head, that layers read and add to.

    Names are relative to the layer, but for `embeddings`, `final_norm` (both after the same prefix) and `head`. norms:
    what reads it, root-mean-square norms without a bias; who reads their outputs is in the family's folds. writers:
    what is added to it, as it is. values: None where attention does more with them than to average. apart: what else
    is in a layer, and has nothing to do with it (regular expressions, searched). `only`: model types it holds for.
    """

    only: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    values: Values | None = Values()
    apart: tuple[str, ...] = ()
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"


@dataclass(frozen=True, slots=True)
class Family:
    """One model family: tables only.

    `linear` and `keep` hold regular expressions that are searched in the *module* name (layer and expert numbers
    replaced by `N`); `keep` comes first, and names every linear weight that stays in high precision. `experts` matches
    the modules inside routed experts. `transposed`: modules whose weight is stored [in, out] (transformers' Conv1D).
    `fused_experts`: 3-D tensors of experts. `dims`: shapes that the config must agree with. `tied`: output heads
    other than `lm_head` that share the embeddings' table, so that checkpoints do not hold them and engines have to be
    told by name that they are not quantized. `parts`: what a whole checkpoint has outside its layers. `uneven`: tensors
    that one layer has and its neighbours have not. `blocks`: what its decoder layers
    compute. `folds`: who gives and who reads the vectors inside a layer.
    `unfolded`: modules of a layer that read what no fold speaks of (regular expressions, searched in the name relative
    to the layer). `streams`: the residual stream, by model type.
    """

    name: str
    model_types: tuple[str, ...]
    linear: tuple[str, ...]
    keep: tuple[tuple[str, Reason], ...] = ()
    fused: tuple[FusedSet, ...] = ()
    experts: str | None = None
    transposed: tuple[str, ...] = ()
    fused_experts: tuple[FusedExperts, ...] = ()
    dims: tuple[Dims, ...] = ()
    tied: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    uneven: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    folds: tuple[Fold, ...] = ()
    unfolded: tuple[str, ...] = ()
    streams: tuple[Stream, ...] = ()


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is: quantizable (`reason` None) or kept for a reason, and where that was learned.

    `by_table`: from the config or the family's table, not from what names and shapes mean in every family.
    """

    reason: Reason | None
    evidence: str
    is_expert: bool = False
    by_table: bool = False
