"""What a bag of tokens passes on its way through a checkpoint: found from headers and config, before anything is read.

A layer's tensors are looked up by the names of its family's `Block`; what is missing, or unlike what the config says,
makes a reason instead of a walk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.factors.file import VectorFile
from quantconvert.families import Block, Experts, Family, Mlp
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources import Read
from quantconvert.sources.sites import heads_of
from quantconvert.sources.steps.scale import Heads

# transformers' names of activations (`activations.py`, `ACT2CLS`), by what they compute.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Linear:
    """Rows first..last of a weight [O, I], and its bias [O] where it has one."""

    weight: Read
    bias: Read | None
    first: int
    last: int

    @property
    def rows(self) -> int:
        return self.last - self.first

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Stored bytes of these rows, about."""
        return self.weight.nbytes * self.rows // max(1, self.weight.shape[0])


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's weight, and its bias where it has one."""

    weight: Read
    bias: Read | None


@dataclass(frozen=True, slots=True)
class Feed:
    """An MLP: the modules that read its input, and what is multiplied. gate: None where there is none."""

    readers: tuple[str, ...]
    gate: Linear | None
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Routed:
    """Experts, what chooses among them, and what every token passes as well."""

    router: Linear
    each: tuple[Feed, ...]
    shared: Feed | None
    shared_gate: Linear | None

    @property
    def readers(self) -> tuple[str, ...]:
        """Every module that reads the layer's normed vector."""
        return (
            *(gate.weight.module for gate in self.gates),
            *(name for feed in self.feeds for name in feed.readers),
        )

    @property
    def gates(self) -> tuple[Linear, ...]:
        """The router, and the gate of what is shared."""
        return (self.router, *([self.shared_gate] if self.shared_gate else []))

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """Every MLP, the shared one last."""
        return (*self.each, *([self.shared] if self.shared else []))


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. readers: the modules that read what attention reads."""

    readers: tuple[str, ...]
    value: Linear
    o: Linear
    mlp: Feed | Routed
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_post: Norm | None
    mlp_post: Norm | None

    @property
    def linears(self) -> Iterator[Linear]:
        """What is read of it."""
        yield from (self.value, self.o)
        yield from self.mlp.gates if isinstance(self.mlp, Routed) else ()
        for feed in self.feeds:
            yield from [feed.gate] if feed.gate else []
            yield from (feed.up, feed.down)

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """Every MLP."""
        return (self.mlp,) if isinstance(self.mlp, Feed) else self.mlp.feeds

    @property
    def inputs(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Every vector whose importances are found: the modules that read it, and how many columns they have."""
        yield self.readers, self.value.columns
        yield (self.o.weight.module,), self.o.columns
        yield self.mlp.readers, self.feeds[-1].up.columns
        for feed in self.feeds:
            yield (feed.down.weight.module,), feed.down.columns


@dataclass(frozen=True, slots=True)
class Walk:
    """The whole way: embeddings [V, D], layers in order, and the config's numbers.

    embedding_scale, residual_scale: what embeddings, and what each half of a layer adds, are multiplied by. top_k: how
    many experts a token goes to. normalized: whether their weights sum to one.
    """

    block: Block
    embeddings: Read
    layers: tuple[Layer, ...]
    heads: Heads
    activation: str
    eps: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    top_k: int = 0
    normalized: bool = True

    @property
    def width(self) -> int:
        """D."""
        return self.embeddings.shape[1]

    @property
    def read_nbytes(self) -> int:
        """Stored bytes of all that is read, embeddings and vectors apart."""
        return sum(linear.nbytes for layer in self.layers for linear in layer.linears)


def bag_file(walk: Walk) -> VectorFile:
    """The file of what a bag finds: one vector an input, under the name of the first module that reads it."""
    return VectorFile(tuple((readers[0], columns) for layer in walk.layers for readers, columns in layer.inputs))


class _Missing(Exception):
    """Why there is no walk, in a clause."""


def find_block(family: Family | None, checkpoint: Checkpoint) -> tuple[Block, Mapping[str, Any]] | None:
    """The block of a checkpoint's language model, and its config with defaults filled in; None: not in the table."""
    config = checkpoint.text_config
    for model_type in (config.get("model_type"), checkpoint.model_type):
        for block in family.blocks if family else ():
            full = {**dict(block.defaults), **{key: value for key, value in config.items() if value is not None}}
            holds = block.only_with is None or full.get(block.only_with[0]) in block.only_with[1]
            if model_type in block.model_types and holds:
                return block, full
    return None


def find_walk(reads: Mapping[str, Read], family: Family | None, checkpoint: Checkpoint) -> Walk | str:
    """The walk through a checkpoint, or in a clause why there is none. `reads`: every tensor, by name."""
    found = find_block(family, checkpoint)
    if found is None:
        return f"what a layer of {checkpoint.model_type or 'this model'} computes is in no family's table"
    try:
        return _Finder(reads, *found).walk()
    except _Missing as missing:
        return str(missing)


class _Finder:
    """Looks up one checkpoint's tensors by the names of a block."""

    def __init__(self, reads: Mapping[str, Read], block: Block, config: Mapping[str, Any]) -> None:
        self.reads, self.block, self.config = reads, block, config

    def walk(self) -> Walk:
        """What is read, in order; raises `_Missing` where something is not as the block says."""
        block = self.block
        embeddings, stem = self._embeddings()
        prefixes = self._prefixes(stem + block.layers + ".")
        activation = ACTIVATIONS.get(str(self.config.get(block.activation)))
        if activation is None:
            raise _Missing(f"activation `{self.config.get(block.activation)}` is not one of {', '.join(ACTIVATIONS)}")
        value, o = self._weight(prefixes[0] + block.qkv[-1]), self._weight(prefixes[0] + block.o)
        heads = heads_of(value.shape[0], o.shape[1], self.config)
        if heads is None:
            raise _Missing(f"config.json does not explain the heads of `{o.module}`")
        layers = tuple(self._layer(prefix, heads, embeddings.shape[1]) for prefix in prefixes)
        experts = block.experts if any(isinstance(layer.mlp, Routed) for layer in layers) else None
        return Walk(
            block, embeddings, layers, heads, activation, self._number(block.eps),
            self._scale(block.embedding_multiplier) * (embeddings.shape[1] ** 0.5 if block.embedding_sqrt else 1.0),
            self._scale(block.residual_multiplier),
            int(self._number(experts.top_k)) if experts else 0,
            bool(self.config.get(experts.normalized)) if experts and experts.normalized else True,
        )  # fmt: skip

    def _embeddings(self) -> tuple[Read, str]:
        """The table of embeddings, and what stands before its name."""
        name = self.block.embeddings + WEIGHT_SUFFIX
        for read in self.reads.values():
            stem = read.name.removesuffix(name)
            is_table = stem + name == read.name and (not stem or stem.endswith(".")) and len(read.shape) == 2
            if is_table and any(other.startswith(f"{stem}{self.block.layers}.0.") for other in self.reads):
                return read, stem
        raise _Missing(f"no `{name}` lies beside layers")

    def _prefixes(self, stem: str) -> list[str]:
        """The layers in order; those after `num_hidden_layers` are not part of the way."""
        numbers = {name[len(stem) :].partition(".")[0] for name in self.reads if name.startswith(stem)}
        present = sorted(int(number) for number in numbers if number.isdecimal())
        count = self.config.get("num_hidden_layers")
        count = count if type(count) is int else len(present)
        missing = next((i for i, number in enumerate(present) if i != number), len(present))
        if missing < max(1, count):
            raise _Missing(f"`{stem}{missing}` is not there")
        return [f"{stem}{i}." for i in range(count)]

    def _layer(self, prefix: str, heads: Heads, width: int) -> Layer:
        block = self.block
        value = self._linear(prefix + block.qkv[-1], width)
        o = self._linear(prefix + block.o, heads.kv_width * heads.repeat, width)
        if value.rows < heads.kv_width:
            raise _Missing(f"`{value.weight.module}` has fewer rows than its heads")
        value = Linear(value.weight, value.bias, value.last - heads.kv_width, value.last)
        return Layer(
            tuple(self._weight(prefix + name).module for name in block.qkv), value, o, self._mlp(prefix, width),
            *(self._norm(prefix, name, width)
              for name in (block.attention_norm, block.mlp_norm, block.attention_post, block.mlp_post)),
        )  # fmt: skip

    def _mlp(self, prefix: str, width: int) -> Feed | Routed:
        experts, mlp = self.block.experts, self.block.mlp
        if experts and (mlp is None or prefix + experts.router + WEIGHT_SUFFIX in self.reads):
            return self._routed(prefix, experts, width)
        if mlp is None:
            raise _Missing(f"`{prefix}` has no experts")
        return self._feed(prefix, mlp, width)

    def _routed(self, prefix: str, experts: Experts, width: int) -> Routed:
        router = self._linear(prefix + experts.router, width)
        if not router.rows:
            raise _Missing(f"`{router.weight.name}` knows no experts")
        each = tuple(self._feed(prefix, experts.each, width, str(i)) for i in range(router.rows))
        shared = shared_gate = None
        if experts.shared and prefix + experts.shared.down + WEIGHT_SUFFIX in self.reads:
            shared = self._feed(prefix, experts.shared, width)
            shared_gate = self._linear(prefix + experts.shared_gate, width, 1) if experts.shared_gate else None
        return Routed(router, each, shared, shared_gate)

    def _feed(self, prefix: str, mlp: Mlp, width: int, number: str = "N") -> Feed:
        inner = [self._linear(prefix + _numbered(name, number), width) for name in mlp.inner]
        down = self._linear(prefix + _numbered(mlp.down, number), inner[-1].rows // (1 + self._is_fused(mlp)), width)
        readers = tuple(linear.weight.module for linear in inner)
        if self._is_fused(mlp):
            (both,) = inner
            inner = [Linear(both.weight, both.bias, *part) for part in ((0, down.columns), (down.columns, both.last))]
        if any(linear.rows != down.columns for linear in inner):
            raise _Missing(f"`{readers[0]}` and `{down.weight.module}` do not fit each other")
        return Feed(readers, inner[0] if mlp.gated else None, inner[-1], down)

    @staticmethod
    def _is_fused(mlp: Mlp) -> bool:
        return mlp.gated and len(mlp.inner) == 1

    def _norm(self, prefix: str, name: str | None, width: int) -> Norm | None:
        if name is None:
            return None
        weight, bias = self._read(f"{prefix}{name}{WEIGHT_SUFFIX}"), self.reads.get(f"{prefix}{name}.bias")
        if weight.shape != (width,):
            raise _Missing(f"`{weight.name}` has shape {list(weight.shape)}: expected [{width}]")
        return Norm(weight, bias)

    def _linear(self, module: str, columns: int, rows: int | None = None) -> Linear:
        weight = self._weight(module)
        if weight.shape[1] != columns or rows not in (None, weight.shape[0]):
            shape = [weight.shape[0] if rows is None else rows, columns]
            raise _Missing(f"`{weight.name}` has shape {list(weight.shape)}: expected {shape}")
        return Linear(weight, self.reads.get(f"{module}.bias"), 0, weight.shape[0])

    def _weight(self, module: str) -> Read:
        read = self._read(module + WEIGHT_SUFFIX)
        if len(read.shape) != 2:
            raise _Missing(f"`{read.name}` has shape {list(read.shape)}: expected two dimensions")
        return read

    def _read(self, name: str) -> Read:
        read = self.reads.get(name)
        if read is None:
            raise _Missing(f"`{name}` is not there")
        return read

    def _scale(self, key: str | None) -> float:
        return self._number(key) if key else 1.0

    def _number(self, key: str) -> float:
        value = self.config.get(key)
        if type(value) not in (int, float):
            raise _Missing(f"config.json does not give `{key}` as a number")
        return float(value)  # type: ignore[arg-type]


def _numbered(name: str, number: str) -> str:
    """`N` replaced by an expert's number."""
    return ".".join(number if part == "N" else part for part in name.split("."))
