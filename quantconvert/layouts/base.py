"""What every output layout must say: which tensors it promises, how codes become bytes, and the config block.

Planning imports this package, so nothing here imports torch until `encode` runs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quantconvert.dtypes import nbytes_of
from quantconvert.errors import UnsupportedError
from quantconvert.number import Kind
from quantconvert.patterns import check_foreign, compile_pattern
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.checkpoint import TensorRef
    from quantconvert.families import FusedSet
    from quantconvert.quantized import Quantized


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Bytes a layout promises for one module, or with an empty suffix those of a tensor under its own name.

    A weight is processed in blocks of rows (output features), so each tensor says how a block lands in it:
    `rows_per_element` source rows make one element along the row axis (8 for int4 words packed along the output
    dimension, 0 when the tensor does not depend on rows), and `transposed` means that the row axis is the last one
    in the file. `encode` always returns blocks with the row axis first.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    rows_per_element: int = 1
    transposed: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", nbytes_of(self.dtype, prod(self.shape)))


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized module that exists: its scheme, the weight's shape [O, I], its tensors by suffix, its layout's name.

    `zero_offset` is added to stored zero points (GPTQ v1 stores them minus one); `reordered` means that columns belong
    to groups by GPTQ's `g_idx` and not in order. `only_dequantize`: why no layout of ours can hold it, if so.
    """

    module: str
    scheme: Scheme
    shape: tuple[int, int]
    refs: Mapping[str, TensorRef]
    zero_offset: int = 0
    reordered: bool = False
    only_dequantize: str | None = None
    layout: str = ""
    scale_suffix: str = "weight_scale"

    @property
    def scale(self) -> TensorRef:
        """The tensor of scales."""
        return self.refs[self.scale_suffix]

    @property
    def form(self) -> Hashable:
        """All of it but whose it is."""
        what = self.scheme, self.shape, self.zero_offset, self.reordered, self.only_dequantize
        return *what, self.layout, self.scale_suffix


@dataclass(frozen=True, slots=True)
class Packed:
    """How unsigned whole numbers [O, I] become a tensor, for kernels.

    along: `columns`, neighbours in a row share a word, the first in the lowest bits; `rows`, neighbours in a column do,
    the row `order[k]` at place k; `pairs`, two rows share a byte, the upper one in the lower half; `bytes`, each is a
    byte. What is missing is zero. shift: added to each before, modulo 256.
    """

    suffix: str
    along: Literal["columns", "rows", "pairs", "bytes"]
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """What `encode` does, as data: to codes, and to zero points, those of symmetric schemes (the midpoint) too."""

    codes: Packed
    zeros: Packed | None = None


# Reads what a config block says of one module, given its tensors by suffix; None where it is not quantized.
ModuleReader = Callable[[str, "Mapping[str, TensorRef]"], Stored | None]


@dataclass(frozen=True, slots=True)
class Selection:
    """What the config block has to tell an engine: which modules have which scheme, and which were left alone.

    tied: heads left alone that the checkpoint may not hold, because they share the embeddings' table. own_names: more
    patterns (`re:...`) of what is left alone, in the names that engines give it.
    """

    schemes: Mapping[Scheme, tuple[str, ...]]
    kept: tuple[str, ...]
    fused: tuple[FusedSet, ...]
    has_experts: bool
    tied: tuple[str, ...] = ()
    own_names: tuple[str, ...] = ()

    @property
    def more_kept(self) -> list[str]:
        """Those of `own_names` that no quantized module bears."""
        return [p for p in self.own_names if not any(map(compile_pattern(p), self.quantized))]

    @property
    def fused_pairs(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((fused.name, fused.members) for fused in self.fused)

    @property
    def kept_and_fused(self) -> tuple[str, ...]:
        """Kept modules, and the engines' names of fused layers of which every part is kept."""
        known = set(self.kept)
        names = list(self.kept)
        for fused in self.fused:
            for name in self.kept:
                stem, dot, last = name.rpartition(".")
                if last == fused.members[0] and all(f"{stem}{dot}{member}" in known for member in fused.members):
                    names.append(f"{stem}{dot}{fused.name}")
        return tuple(names)

    @property
    def quantized(self) -> tuple[str, ...]:
        return tuple(name for names in self.schemes.values() for name in names)


def grouped_scheme(num_bits: int, symmetric: bool, columns: int, groups: int, declared: object) -> Scheme:
    """The scheme of a module whose scale has `groups` columns, in a checkpoint that declares one group size.

    Raises `UnsupportedError` where the last group is smaller than the others.
    """
    if groups < 1 or columns % groups:
        raise UnsupportedError(f"{groups} groups in {columns} columns: expected groups of one size")
    if isinstance(declared, int) and declared > 0 and -(-columns // declared) == groups and columns % declared:
        raise UnsupportedError(f"group_size {declared} in {columns} columns leaves a smaller last group")
    if groups == 1 and declared != columns:
        return Scheme(num_bits, symmetric, "channel")
    return Scheme(num_bits, symmetric, "group", columns // groups)


def skipped_by(block: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a `dynamic` rule of GPTQModel (`-:REGEX`) leaves a module alone."""
    rules = [str(rule) for rule in block.get("dynamic") or ()]
    patterns = [re.compile(check_foreign(rule.removeprefix("-:"))) for rule in rules if rule.startswith("-:")]
    return lambda module: any(pattern.match(module) for pattern in patterns)


def width_by(block: Mapping[str, Any], module: str) -> tuple[int, int] | None:
    """Bits and group size (-1 per channel) that AWQ's or GPTQ's config states for a module; None where it does not.

    The first `dynamic` rule of GPTQModel (`+:REGEX`) that matches has its own.
    """
    fields = dict(block)
    for rule, own in (block.get("dynamic") or {}).items():
        if not str(rule).startswith("-:") and re.match(check_foreign(str(rule).removeprefix("+:")), module):
            fields |= own
            break
    bits, size = fields.get("bits", fields.get("w_bit")), fields.get("group_size", fields.get("q_group_size"))
    return None if bits is None or size is None else (int(bits), int(size))


class Layout(ABC):
    """One on-disk layout. Sources for each layout stand in its own file."""

    name: ClassVar[str]
    summary: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    # The tensor of scales, and those that may be missing from other tools' checkpoints.
    scale_suffix: ClassVar[str] = "weight_scale"
    optional: ClassVar[frozenset[str]] = frozenset()
    symmetric_by_default: ClassVar[bool]
    # Kinds of numbers that it holds.
    kinds: ClassVar[tuple[Kind, ...]] = ("int",)
    # What is written where nothing of the scheme is asked for, by name; empty: int4 by groups.
    default_scheme: ClassVar[str] = ""
    weight_only: ClassVar[bool] = True
    # Tensors that codes do not decide; repacked as they are.
    constant: ClassVar[frozenset[str]] = frozenset()
    # Whether engines see from tensors, and not from the config block, which modules are quantized.
    tensors_tell: ClassVar[bool] = False
    # Whether symmetry has to be seen from zero points, one symmetry for the whole checkpoint.
    zeros_tell_symmetry: ClassVar[bool] = False

    @abstractmethod
    def problems(self, scheme: Scheme, shape: tuple[int, ...], module: str) -> list[str]:
        """Why the weight of `module`, of `shape` [O, I], cannot be written under `scheme`; empty when it can."""

    def rank_problems(self, scheme: Scheme, shape: tuple[int, int], module: str) -> list[str]:
        """Why a tensor-parallel rank cannot hold its share of `shape` [O, I] of a stored weight."""
        return self.problems(scheme, shape, module)

    def mix_problem(self, schemes: Sequence[Scheme]) -> str | None:
        """Why one model cannot hold all of `schemes`; None when it can."""
        return f"{self.name} holds one scheme for the whole model"

    def is_symmetric(self, num_bits: int) -> bool:
        """What is written where nobody says whether weights of so many bits are to be symmetric."""
        return self.symmetric_by_default

    @abstractmethod
    def row_multiple(self, scheme: Scheme) -> int:
        """Blocks of rows must start at a multiple of this."""

    def scale_dtype(self, weight_dtype: str) -> str:
        """The stored dtype of scales for a weight of `weight_dtype`: the weight's own unless a layout fixes it."""
        return weight_dtype

    def slack(self, scheme: Scheme, scale_dtype: str) -> float:
        """By how many steps values may be off because of what is stored in place of a zero point."""
        return 0.0

    @abstractmethod
    def outputs(self, shape: tuple[int, ...], weight_dtype: str, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """The tensors that replace `M.weight` of `shape` [O, I]."""

    def stored_outputs(self, stored: Stored) -> tuple[TensorSpec, ...]:
        """The tensors of a module that exists; those of `outputs`, where a layout reads no other than it writes."""
        return self.outputs(stored.shape, stored.scale.dtype, stored.scheme)

    @abstractmethod
    def encode(self, quantized: Quantized, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Blocks for the tensors of `outputs`, by suffix, row axis first. `shape` is the whole weight's [O, I].

        Those of `constants` are not among them.
        """

    def packing(self, scheme: Scheme) -> Packing | None:
        """What `encode` does to codes and zero points, and `decode` undoes, where that is no more than `Packing` can
        say; scales and what `shaped` gives come beside. None: there is no other way than `encode`.
        """
        return None

    def shaped(self, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, array[int]]:
        """The tensors of `encode` that the shape alone decides, int32 or int64."""
        return {}

    def shaped_tensors(self, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The same as tensors."""
        import torch

        dtypes = {4: torch.int32, 8: torch.int64}
        found = self.shaped(scheme, shape)
        return {name: torch.frombuffer(values, dtype=dtypes[values.itemsize]) for name, values in found.items()}

    def constants(self, scheme: Scheme, weight_dtype: str, input_max: float | None) -> dict[str, Tensor]:
        """The tensors of `outputs` whose suffix is in `constant`. input_max: max |x| of the module's input, where the
        scheme's activations are static.
        """
        return {}

    @abstractmethod
    def decode(self, blocks: Mapping[str, Tensor], stored: Stored, rows: int) -> Quantized:
        """What is stored in a block of `rows` rows, row axis first: the inverse of `encode`.

        `g_idx` comes whole in `blocks` where the layout has one.
        """

    def dequantize(self, quantized: Quantized) -> Tensor:
        """What engines compute from what `decode` found, float32 [rows, I]: the values that verification judges."""
        from quantconvert.quantized import dequantize

        return dequantize(quantized)

    @abstractmethod
    def reader(self, block: Mapping[str, Any], read: Callable[[TensorRef], bytes]) -> ModuleReader:
        """How to recognise this format's modules in a checkpoint whose `quantization_config` is `block`.

        `read` returns the bytes of a small tensor. The reader raises `CheckpointError` for a module that contradicts
        the config, `UnsupportedError` for one that is legal but not integer codes of 4 or 8 bits.
        """

    @abstractmethod
    def config(self, selection: Selection) -> dict[str, Any]:
        """The `quantization_config` block of config.json."""

    def beside(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """What else config.json says, at its top, where engines look elsewhere than in that block."""
        return {}

    @abstractmethod
    def leaves(self, block: Mapping[str, Any]) -> Callable[[str], bool]:
        """Whether a config block tells engines to leave the linear layer of a name alone."""

    def width(self, block: Mapping[str, Any], module: str) -> tuple[int, int] | None:
        """Bits and group size that a config block states for a module, where reading does not follow them anyway."""
        return None
