"""Where factors can move inside a checkpoint: each vector whose giver and readers a family's table knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.dtypes import DTYPES
from quantconvert.errors import some
from quantconvert.families import Family, Fold, stands_aside
from quantconvert.patterns import WEIGHT_SUFFIX, layer_of, template_of
from quantconvert.sources.read import Read
from quantconvert.sources.steps.base import Step
from quantconvert.sources.steps.scale import Heads, Scale, Way


class Site(NamedTuple):
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

    def base(self, giver: Read) -> int:
        """1 where what is stored is added to 1 before it multiplies."""
        return int(self.fold.kind == "1 + norm" and giver.name.endswith(WEIGHT_SUFFIX))

    def steps(self, factors: TensorRef) -> Iterator[tuple[str, Step]]:
        """The step of each tensor that takes part, by its name."""
        for read in self.givers:
            way: Way = "rows" if len(read.shape) == 2 else "1 + vector" if self.base(read) else "vector"
            yield read.name, Scale(factors, way, self.start)
        columns = Scale(factors, "columns", heads=self.heads)
        for read in self.readers:
            yield read.name, columns


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
    alike: dict[Hashable, _Found] = {}
    for prefix, members in layers.items():
        if stands_aside(prefix, family):
            continue
        kind = template_of(prefix), tuple((read.name[len(prefix) :], read.shape, read.dtype) for read in members)
        if kind not in alike:
            alike[kind] = _look(prefix, members, folds, config, family.unfolded)
        sites += alike[kind].sites(prefix, members)
        for problem in alike[kind].problems:
            problems.setdefault(problem, []).append(prefix.rstrip("."))
    return sites, [f"{what} ({some(where)})" for what, where in problems.items()]


class _Found(NamedTuple):
    """What holds for all layers with the same tensors: sites of the first, the places of their givers and readers among
    its members, and what is wrong with the others.
    """

    prefix: str
    first: tuple[Site, ...]
    places: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    problems: tuple[str, ...]

    def sites(self, prefix: str, members: Sequence[Read]) -> Iterator[Site]:
        """Those of the layer that has these members."""
        for site, (givers, readers) in zip(self.first, self.places, strict=True):
            name = prefix + site.name[len(self.prefix) :]
            own = tuple([members[i] for i in givers]), tuple([members[i] for i in readers])
            yield Site(name, site.fold, site.width, *own, site.start, site.heads)


def _look(
    prefix: str, members: Sequence[Read], folds: Sequence[Fold], config: Mapping[str, Any], unfolded: tuple[str, ...]
) -> _Found:
    """Look for the vectors of one layer."""
    layer = _Layer(prefix, members)
    vectors = [vector for fold in folds for vector in _vectors(fold, layer)]
    count = Counter(read.name for vector in vectors for read in vector.readers)
    sites, problems = [], []
    for vector in vectors:
        site = _site(vector, prefix, config)
        problem = site if isinstance(site, str) else _doubt(site, layer, count, unfolded)
        if isinstance(site, str) or problem:
            problems.append(f"`{vector.fold.producer}` {problem}")
        else:
            sites.append(site)
    at = {read.name: i for i, read in enumerate(members)}
    places = [tuple(tuple(at[read.name] for read in reads) for reads in (s.givers, s.readers)) for s in sites]
    return _Found(prefix, tuple(sites), tuple((givers, readers) for givers, readers in places), tuple(problems))


def scaled(
    reads: Sequence[Read], family: Family | None, checkpoint: Checkpoint, places: Mapping[str, TensorRef]
) -> tuple[list[Read], list[str]]:
    """The reads with the steps that factors found before ask for, and names of factors that belong nowhere."""
    sites = {site.name: site for site in find_sites(reads, family, checkpoint)[0]} if places else {}
    known = {name: ref for name, ref in places.items() if name in sites and ref.shape == (sites[name].width,)}
    return with_steps(reads, [(sites[name], ref) for name, ref in known.items()]), [n for n in places if n not in known]


def with_steps(reads: Sequence[Read], factors: Sequence[tuple[Site, TensorRef]]) -> list[Read]:
    """The reads, in their order, with a step for each site that they take part in."""
    steps: dict[str, tuple[Step, ...]] = {}
    for site, place in factors:
        for name, step in site.steps(place):
            steps[name] = (*steps.get(name, ()), step)
    return [read.stepped(steps[read.name]) if read.name in steps else read for read in reads]


def _holds(fold: Fold, config: Mapping[str, Any], model_types: Sequence[object]) -> bool:
    own = next((name for name in reversed(model_types) if name), "")
    if fold.only and own not in fold.only:
        return False
    if fold.unless and _value(config, fold.unless[0]) in fold.unless[1]:
        return False
    return fold.where is None or _value(config, fold.where[0]) in fold.where[1]


def _value(config: Mapping[str, Any], key: str) -> object:
    """What the config says of a key, inside of others where it has dots; None where it says nothing."""
    found: object = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


class _Layer:
    """The tensors of one layer, by names relative to it."""

    def __init__(self, prefix: str, reads: Sequence[Read]) -> None:
        self.by_name = {read.name[len(prefix) :]: read for read in reads}
        self.by_template: dict[str, list[str]] = {}
        for name in self.by_name:
            self.by_template.setdefault(template_of(name), []).append(name)

    def modules(self, name: str) -> list[str]:
        """The modules with a weight that a table calls `name`: of each number that `N` stands for, or the one."""
        weight = name + WEIGHT_SUFFIX
        found = self.by_template.get(weight) or ([weight] if weight in self.by_name else [])
        return [module.removesuffix(WEIGHT_SUFFIX) for module in found]

    def weight(self, module: str) -> Read:
        return self.by_name[module + WEIGHT_SUFFIX]


class _Vector(NamedTuple):
    """What a fold speaks of in one layer."""

    fold: Fold
    module: str
    givers: tuple[Read, ...]
    readers: tuple[Read, ...]


def _vectors(fold: Fold, layer: _Layer) -> Iterator[_Vector]:
    """Each vector of a layer that has both a giver and readers."""
    for module in layer.modules(fold.producer):
        pairs = zip(fold.producer.split("."), module.split("."), strict=True)
        numbers = [own for part, own in pairs if part == "N"]
        names = [_numbered(reader, numbers) if numbers else reader for reader in fold.readers]
        readers = tuple(layer.weight(found) for name in names for found in layer.modules(name))
        bias = layer.by_name.get(f"{module}.bias")
        if readers:
            yield _Vector(fold, module, (layer.weight(module), *([bias] if bias else [])), readers)


def _numbered(module: str, numbers: Sequence[str]) -> str:
    """`N` after `N` replaced by the numbers of another module."""
    left = list(numbers)
    return ".".join(left.pop(0) if part == "N" and left else part for part in module.split("."))


def _site(vector: _Vector, prefix: str, config: Mapping[str, Any]) -> Site | str:
    """The site of a vector, or what is wrong with its shapes."""
    fold, _, givers, readers = vector
    columns = {read.shape[-1] for read in readers}
    if any(len(read.shape) != 2 for read in readers) or len(columns) != 1:
        return "is read by weights of several widths"
    (width,) = columns
    rows, heads = givers[0].shape[0], None
    if fold.heads:
        heads = _heads(fold, rows, width, config)
        if heads is None:
            return "has heads that config.json does not explain"
        width = heads.kv_width
    fits = rows == width if fold.kind != "rows" else rows >= width and (fold.heads or rows % width == 0)
    rank = 2 if fold.kind == "rows" else 1
    if not fits or len(givers[0].shape) != rank or any(read.shape[0] != rows for read in givers):
        return f"has shape {list(givers[0].shape)} before readers of {width} columns"
    return Site(prefix + vector.module, fold, width, givers, readers, rows - width, heads)


def _heads(fold: Fold, rows: int, columns: int, config: Mapping[str, Any]) -> Heads | None:
    """How heads share what gives them a vector."""
    if fold.kind != "rows":
        return Heads(rows, columns // rows, 1) if rows and columns % rows == 0 else None
    return heads_of(rows, columns, config, fold.head_dim)


def heads_of(rows: int, columns: int, config: Mapping[str, Any], head_dim: int | None = None) -> Heads | None:
    """How query heads of `columns` share the key-value heads at the end of `rows`: shapes and config have to agree.

    Of more rows than columns, the last are the values of a fused query, key and value. head_dim: where the config does
    not say how many columns a head has.
    """
    queries = config.get("num_attention_heads", config.get("n_head"))
    head_dim = config.get("head_dim", head_dim)
    if queries is None and rows == columns:
        return Heads(columns, 1, 1)
    if queries is None and type(head_dim) is int and head_dim > 0:
        queries = columns // head_dim
    if type(queries) is not int or queries < 1 or columns % queries:
        return None
    head_dim = columns // queries
    values = rows if rows <= columns else (rows - columns) // 2
    shared = values // head_dim if head_dim else 0
    agreed = config.get("num_key_value_heads") in (None, shared)
    if not agreed or not shared or queries % shared or rows not in (shared * head_dim, columns + 2 * shared * head_dim):
        return None
    return Heads(head_dim, queries // shared, shared)


@lru_cache(maxsize=4096)
def _is_unfolded(module: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, module) for pattern in patterns)


def _doubt(site: Site, layer: _Layer, count: Mapping[str, int], unfolded: tuple[str, ...]) -> str | None:
    """Why a site may be none: a matrix as wide as what a norm gives, of which the table does not say what it reads, may
    read just that; and what reads two vectors reads neither. count: of how many vectors a tensor reads.
    """
    twice = next((read.module for read in site.readers if count[read.name] > 1), None)
    if twice is not None:
        return f"is read by `{template_of(twice)}`, which the family's table has read something else too"
    if site.fold.kind == "rows":
        return None
    for template, names in layer.by_template.items():
        module = template.removesuffix(WEIGHT_SUFFIX)
        reads = [layer.by_name[name] for name in names if not name.endswith("bias")]  # older GPTs' masks, and biases
        wide = [read for read in reads if site.width in read.shape[1:] and DTYPES[read.dtype].is_weight]
        if any(not count[read.name] for read in wide) and not _is_unfolded(module, unfolded):
            return f"may be read by `{module}`, of which the family's table does not say"
    return None
