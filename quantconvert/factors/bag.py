"""Importances without data: a bag of tokens pushed through the layers.

h_j = E[x_j^2] of the input of each linear module. 512 embeddings go through the layers in order; attention gives each
head r v + (1 - r) times the mean of three other tokens' v, r uniform in [0, 1); norms, activations, MLPs and residuals
are the model's own, and experts those that its router chooses. Weights are read row tile by row tile through
`open_rows`, whatever their encoding. What is no number counts as zero on the way. Imports torch.

Legend: N tokens, T tokens of an expert, D width of the stream, C columns of a vector, R rows of a tile, E experts, H
query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quantconvert.buffers import Workspace
from quantconvert.factors.draws import Draws
from quantconvert.factors.room import SQUARE_COLUMNS, Execution, bag_workers
from quantconvert.factors.tiles import Advance, Tiles, Use
from quantconvert.factors.walk import Feed, Layer, Linear, Norm, Routed, Walk
from quantconvert.sources import open_rows
from quantconvert.sources.rows import Files
from quantconvert.spans import spans
from quantconvert.workers import worker_pool

# At least so many tokens pass an expert: those that its router likes best, beside those that it gets.
LEAST_TOKENS = 16
# Vectors are normed so many tokens at a time.
NORM_TOKENS = 32


def bag(
    walk: Walk, files: Files, execution: Execution, advance: Advance, draws: Draws | None = None
) -> dict[str, Tensor]:
    """h float32 [C] by module (`model.layers.0.self_attn.q_proj`), finite and not negative.

    Modules that read one vector share the tensor; experts read what their router reads. The same for any number of
    workers. Raises what `advance` and reading the source raise.
    """
    workers = bag_workers(walk, execution)
    with worker_pool(workers) as pool:
        tiles = Tiles(pool, workers, files, execution.slab_nbytes, advance)
        return _Bag(walk, tiles, draws or Draws()).run()


class _Bag:
    """One bag on its way: the stream x float32 [N, D]."""

    def __init__(self, walk: Walk, tiles: Tiles, draws: Draws) -> None:
        self.walk, self.tiles, self.draws, self.work = walk, tiles, draws, Workspace()
        self.found: dict[str, Tensor] = {}
        self.x = self._buffer("stream", draws.tokens, walk.width)

    def run(self) -> dict[str, Tensor]:
        """Importances by module, once all tokens went through all layers."""
        self._embed()
        for number, layer in enumerate(self.walk.layers):
            normed = self._normed(layer.attention_norm)
            self._note(layer.readers, normed)
            self._attend(number, layer, normed)
            if not self.walk.block.parallel:
                normed = self._normed(layer.mlp_norm)
            self._note(layer.mlp.readers, normed)
            self._feed(layer, normed)
        return self.found

    def _buffer(self, purpose: str, tokens: int, columns: int) -> Tensor:
        return self.work.tensor(purpose, torch.float32, (tokens, columns))

    def _embed(self) -> None:
        read = self.walk.embeddings
        rows = open_rows(read, self.tiles.files, Workspace(), self.tiles.slab_nbytes)
        drawn = enumerate(self.draws.ids(read.shape[0]))
        for i, number in sorted(drawn, key=lambda pair: pair[1]):
            self.x[i] = rows.rows(number, number + 1)[0]
            self.tiles.advance(read.name, 0)
        self.x.mul_(self.walk.embedding_scale).nan_to_num_(0.0, 0.0, 0.0)

    def _normed(self, norm: Norm | None) -> Tensor:
        """The stream after a norm [N, D]."""
        normed = self._buffer("normed", *self.x.shape).copy_(self.x)
        if norm is not None:
            self._norm(norm, normed)
        return normed

    def _norm(self, norm: Norm, x_ND: Tensor) -> None:
        """In place: as `NormKind` says."""
        kind = self.walk.block.norm
        weight = self.tiles.vector(norm.weight) + (1 if kind.startswith("1 +") else 0)
        bias = self.tiles.vector(norm.bias) if norm.bias else None
        for first, last in spans(0, len(x_ND), NORM_TOKENS):
            part = x_ND[first:last]
            if kind.endswith("layer"):
                part.sub_(part.mean(-1, keepdim=True))
            part.mul_(part.square().mean(-1, keepdim=True).add_(self.walk.eps).rsqrt_()).mul_(weight)
            if bias is not None:
                part.add_(bias)

    def _note(self, modules: Sequence[str], x_NC: Tensor) -> None:
        """Keep the importances of what modules read; where they are no numbers, their mean, and 0 in x."""
        h = torch.empty(x_NC.shape[1])
        for first, last in spans(0, x_NC.shape[1], SQUARE_COLUMNS):
            h[first:last] = x_NC[:, first:last].double().square_().mean(0)
        usable = torch.isfinite(h)
        if not bool(usable.all()):
            h[~usable] = h[usable].mean() if bool(usable.any()) else 1.0
            x_NC.nan_to_num_(0.0, 0.0, 0.0)
        self.found |= dict.fromkeys(modules, h)

    def _attend(self, number: int, layer: Layer, normed: Tensor) -> None:
        """Add what attention gives."""
        values = self._buffer("values", len(normed), layer.value.rows)
        self.tiles.each([layer.value], normed, lambda first, products: _place(values, first, products[0]))
        mixed = self._buffer("inner", len(normed), layer.o.columns)
        self._mix(values, mixed, number)
        self._note([layer.o.weight.module], mixed)
        self._add(layer.attention_post, lambda target: self.tiles.each([layer.o], mixed, _adding(target)))

    def _mix(self, values: Tensor, mixed: Tensor, number: int) -> None:
        """r v + (1 - r) times the mean of other tokens' v, for each query head."""
        heads = self.walk.heads
        own, others = self.draws.mixture(number, heads.repeat * heads.shared)
        size = heads.head_dim
        for head in range(heads.repeat * heads.shared):
            begin = head // heads.repeat * size
            v = values[:, begin : begin + size]
            rest = v[others[head]].mean(1)
            mixed[:, head * size : (head + 1) * size] = torch.lerp(rest, v, own[head, :, None])

    def _add(self, post: Norm | None, give: Callable[[Tensor], None]) -> None:
        """Add to the stream what `give` adds to its target [N, D], normed where there is a norm for that."""
        scale = self.walk.residual_scale
        if post is None and scale == 1:
            return give(self.x)
        branch = self._buffer("branch", *self.x.shape).zero_()
        give(branch)
        if post is not None:
            self._norm(post, branch)
        self.x.add_(branch.nan_to_num_(0.0, 0.0, 0.0), alpha=scale)

    def _feed(self, layer: Layer, normed: Tensor) -> None:
        """Add what the MLP, or the experts, give."""
        mlp = layer.mlp

        def give(target: Tensor) -> None:
            if isinstance(mlp, Feed):
                self._pass(mlp, normed, _adding(target))
            else:
                self._route(mlp, normed, target)

        self._add(layer.mlp_post, give)

    def _pass(self, feed: Feed, x_TD: Tensor, use: Use) -> None:
        """Tokens through one MLP; `use` takes what it gives."""
        activate = ACTIVATE[self.walk.activation]
        inner = self._buffer("inner", len(x_TD), feed.down.columns)

        def place(first: int, products: Sequence[Tensor]) -> None:
            gate, up = products[0], products[-1]
            _place(inner, first, activate(gate) if feed.gate is None else activate(gate).mul_(up))

        self.tiles.each([*([feed.gate] if feed.gate else []), feed.up], x_TD, place)
        self._note([feed.down.weight.module], inner)
        self.tiles.each([feed.down], inner, use)

    def _all(self, linear: Linear, x_ND: Tensor) -> Tensor:
        """The whole product with a narrow weight, float32 [N, O]."""
        found = torch.empty(len(x_ND), linear.rows)
        self.tiles.each([linear], x_ND, lambda first, products: _place(found, first, products[0]))
        return found.nan_to_num_(0.0, 0.0, 0.0)

    def _route(self, mlp: Routed, normed: Tensor, target: Tensor) -> None:
        """Each token to its experts, and to the shared one."""
        liked_NE = self._all(mlp.router, normed).softmax(-1)
        top = liked_NE.sort(dim=-1, descending=True, stable=True)
        count = min(self.walk.top_k, liked_NE.shape[1])
        weights, chosen = top.values[:, :count], top.indices[:, :count]
        if self.walk.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        for number, feed in enumerate(mlp.each):
            routed, place = (chosen == number).nonzero(as_tuple=True)
            best = liked_NE[:, number].sort(descending=True, stable=True).indices
            others = best[~torch.isin(best, routed)][: max(0, LEAST_TOKENS - len(routed))]
            weight = torch.cat((weights[routed, place], torch.zeros(len(others))))
            tokens = torch.cat((routed, others))
            self._pass(feed, torch.index_select(normed, 0, tokens), _adding(target, tokens, weight))
        if mlp.shared:
            gate = self._all(mlp.shared_gate, normed).sigmoid_()[:, 0] if mlp.shared_gate else None
            self._pass(mlp.shared, normed, _adding(target, None, gate))


def _place(x_NC: Tensor, first: int, part_NR: Tensor) -> None:
    x_NC[:, first : first + part_NR.shape[1]] = part_NR


def _adding(target: Tensor, tokens: Tensor | None = None, weight: Tensor | None = None) -> Use:
    """Adds products to their columns of the target; of these tokens, times a weight a token."""

    def add(first: int, products: Sequence[Tensor]) -> None:
        """Into the columns from `first` on."""
        (part_TR,) = products
        part_TR.nan_to_num_(0.0, 0.0, 0.0)
        if weight is not None:
            part_TR.mul_(weight[:, None])
        columns = target[:, first : first + part_TR.shape[1]]
        if tokens is None:
            columns.add_(part_TR)
        else:
            columns.index_add_(0, tokens, part_TR)

    return add


ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square_(),
}
