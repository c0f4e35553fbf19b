"""Where factors can move inside a checkpoint: each vector whose giver and readers a family's table knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import some
from quantconvert.families import Family, Fold
from quantconvert.patterns import WEIGHT_SUFFIX, layer_of, template_of
from quantconvert.sources.read import Read
from quantconvert.sources.steps.base import Step
from quantconvert.sources.steps.scale import Heads, Scale, Way


@dataclass(frozen=True, slots=True)
class Site:
    """One vector [width] inside a layer.

    name: the module that gives it. givers: that module's weight and, where it has one, its bias; they take the factors
    from row (or element) `start` on. readers: every weight whose columns are divided by them, by query heads where
    `heads` says so.
    """

    name: str
    fold: Fold
    width: int
    givers: tuple[Read, ...]
    readers: tuple[Read, ...]
    start: int = 0
    heads: Heads | None = None

    def steps(self, factors: TensorRef) -> Iterator[tuple[str, Step]]:
        """The step of each tensor that takes part, by its name."""
        for read in self.givers:
            way: Way = "rows" if len(read.shape) == 2 else "1 + vector" if self.fold.kind == "1 + norm" else "vector"
            yield read.name, Scale(factors, way, self.start)
        for read in self.readers:
            yield read.name, Scale(factors, "columns", heads=self.heads)


def find_sites(reads: Sequence[Read], family: Family | None, checkpoint: Checkpoint) -> tuple[list[Site], list[str]]:
    """The sites of a checkpoint, in the order of its layers, and why some that its table promises are none."""
    config = checkpoint.text_config
    model_types = (checkpoint.model_type, config.get("model_type"))
    sites: list[Site] = []
    problems: dict[str, list[str]] = {}
    folds = [fold for fold in (family.folds if family else ()) if _holds(fold, config, model_types)]
    if family is None or not folds:
        return [], []
    layers: dict[str, list[Read]] = {}
    for read in reads:
        layer = layer_of(read.name)
        if layer is not None:
            layers.setdefault(layer, []).append(read)
    claimed = _claims(family, folds)
    for prefix, members in layers.items():
        layer_reads = _Layer(prefix, members)
        for fold in folds:
            for site in _sites_of(fold, layer_reads, config):
                problem = site if isinstance(site, str) else _unclaimed(site, layer_reads, claimed)
                if isinstance(site, str) or problem:
                    problems.setdefault(f"`{fold.producer}` {problem}", []).append(prefix.rstrip("."))
                else:
                    sites.append(site)
    return sites, [f"{what} ({some(where)})" for what, where in problems.items()]


def scaled(
    reads: Sequence[Read], family: Family | None, checkpoint: Checkpoint, places: Mapping[str, TensorRef]
) -> tuple[list[Read], list[str]]:
    """The reads with the steps that factors found before ask for, and names of factors that belong nowhere."""
    sites = {site.name: site for site in find_sites(reads, family, checkpoint)[0]} if places else {}
    known = {name: ref for name, ref in places.items() if name in sites and ref.shape == (sites[name].width,)}
    return with_steps(reads, [(sites[name], ref) for name, ref in known.items()]), [n for n in places if n not in known]


def with_steps(reads: Sequence[Read], factors: Sequence[tuple[Site, TensorRef]]) -> list[Read]:
    """The reads, in their order, with a step for each site that they take part in."""
    steps: dict[str, list[Step]] = {}
    for site, place in factors:
        for name, step in site.steps(place):
            steps.setdefault(name, []).append(step)
    return [replace(read, steps=(*read.steps, *steps[read.name])) if read.name in steps else read for read in reads]


def _holds(fold: Fold, config: Mapping[str, Any], model_types: Sequence[object]) -> bool:
    if fold.only and not set(fold.only) & set(model_types):
        return False
    return fold.unless is None or config.get(fold.unless[0]) not in fold.unless[1]


class _Layer:
    """The tensors of one layer, by names relative to it."""

    def __init__(self, prefix: str, reads: Sequence[Read]) -> None:
        self.prefix = prefix
        self.by_name = {read.name[len(prefix) :]: read for read in reads}
        self.by_template: dict[str, list[str]] = {}
        for name in self.by_name:
            self.by_template.setdefault(template_of(name), []).append(name)

    def weights(self, module: str) -> list[Read]:
        """The weights of a module, of each number that `N` may stand for."""
        return [self.by_name[name] for name in self.by_template.get(module + WEIGHT_SUFFIX, ())]


def _sites_of(fold: Fold, layer: _Layer, config: Mapping[str, Any]) -> Iterator[Site | str]:
    """The vectors that a fold describes in one layer, or what is wrong with them."""
    for name in layer.by_template.get(fold.producer + WEIGHT_SUFFIX, ()):
        module = name.removesuffix(WEIGHT_SUFFIX)
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", module)
        readers = []
        for reader in fold.readers:
            if numbers and "N" in reader.split("."):
                found = layer.by_name.get(_numbered(reader, numbers) + WEIGHT_SUFFIX)
                readers += [found] if found else []
            else:
                readers += layer.weights(reader)
        givers = [layer.by_name[name]]
        givers += [layer.by_name[f"{module}.bias"]] if f"{module}.bias" in layer.by_name else []
        if readers:
            yield _site(fold, layer.prefix + module, givers, readers, config)


def _numbered(module: str, numbers: Sequence[str]) -> str:
    """`N` after `N` replaced by the numbers of another module."""
    left = list(numbers)
    return ".".join(left.pop(0) if part == "N" and left else part for part in module.split("."))


def _site(
    fold: Fold, name: str, givers: Sequence[Read], readers: Sequence[Read], config: Mapping[str, Any]
) -> Site | str:
    columns = {read.shape[-1] for read in readers}
    if any(len(read.shape) != 2 for read in readers) or len(columns) != 1:
        return "is read by weights of several widths"
    (width,) = columns
    heads = None
    rows = givers[0].shape[0]
    if fold.heads:
        heads = _heads(rows, width, config)
        if heads is None:
            return "has heads that config.json does not explain"
        width = heads.kv_width
    start = rows - width if fold.kind == "rows" else 0
    rank = 2 if fold.kind == "rows" else 1
    if len(givers[0].shape) != rank or start < 0 or any(read.shape[0] != rows for read in givers):
        return f"has shape {list(givers[0].shape)} before readers of {width} columns"
    return Site(name, fold, width, tuple(givers), tuple(readers), start, heads)


def _heads(rows: int, columns: int, config: Mapping[str, Any]) -> Heads | None:
    """How the query heads of `columns` share key-value heads: by the config, to which the shapes must agree."""
    queries, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    shared = queries if shared is None else shared
    if type(queries) is not int or type(shared) is not int or min(queries, shared) < 1:
        return None
    if columns % queries or queries % shared or rows < shared * (columns // queries):
        return None
    return Heads(columns // queries, queries // shared, shared)


_Claims = Callable[[str], bool]


def _claims(family: Family, folds: Sequence[Fold]) -> _Claims:
    """Whether a module (by its template) reads what some fold speaks of, or is known to read something else."""
    readers = {reader for fold in (*family.folds, *folds) for reader in fold.readers}

    @lru_cache(maxsize=1024)
    def claimed(module: str) -> bool:
        return module in readers or any(re.search(pattern, module) for pattern in family.unfolded)

    return claimed


def _unclaimed(site: Site, layer: _Layer, claimed: _Claims) -> str | None:
    """A matrix as wide as what a norm gives, of which the table does not say what it reads, may read just that."""
    if site.fold.kind == "rows":
        return None
    for template, names in layer.by_template.items():
        shape = layer.by_name[names[0]].shape
        module = template.removesuffix(WEIGHT_SUFFIX)
        if len(shape) > 1 and site.width in shape[1:] and not claimed(module):
            return f"may be read by `{module}`, of which the family's table does not say"
    return None
