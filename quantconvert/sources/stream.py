"""The residual stream of a checkpoint: every tensor that gives it, reads it or adds to it, by the family's table.

A rotation is exact only if nothing is forgotten, so each tensor of the source must be in a place of the table; what is
in none is a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import QuantConvertError, UnsupportedError, some
from quantconvert.families import FAMILIES, Family, Stream, Values
from quantconvert.patterns import WEIGHT_SUFFIX, layer_of, module_of, template_of
from quantconvert.sources.read import Read
from quantconvert.sources.sites import Site, find_sites

# How the architectures end whose output is a head's.
_WITH_HEAD = "ForCausalLM"


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm that reads the stream, and the weights [O, width] that read what it gives.

    plus_one: it multiplies by 1 more than its stored weight.
    """

    read: Read
    plus_one: bool
    readers: tuple[Read, ...]


@dataclass(frozen=True, slots=True)
class StreamReads:
    """The stream [width]. norms: the last is the final one, which the head reads. writers: weights [width, I] and
    biases [width]. is_tied: the head is not stored, and read from the embeddings.
    """

    width: int
    embeddings: Read
    norms: tuple[Norm, ...]
    writers: tuple[Read, ...]
    head: Read
    is_tied: bool


def model_types(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the config and that of its language model call themselves."""
    return checkpoint.model_type, str(checkpoint.text_config.get("model_type") or "")


def table_of(family: Family | None, checkpoint: Checkpoint) -> Stream:
    """The table of the stream for a checkpoint; raises `UnsupportedError` where there is none."""
    types = model_types(checkpoint)
    own = types[1] or types[0]
    for stream in family.streams if family else ():
        if own in stream.only:
            return stream
    known = sorted({name for row in FAMILIES for stream in row.streams for name in stream.only})
    raise UnsupportedError(
        f"--rotate: no table says what reads and writes the residual stream of `{own or 'no model_type'}`",
        hint=f"models that can be rotated: {', '.join(known)}",
    )


def find_stream(
    reads: Sequence[Read], family: Family, stream: Stream, checkpoint: Checkpoint, errors: list[QuantConvertError]
) -> StreamReads | None:
    """Every tensor of the stream; None, with refusals, where some are missing or the source holds others."""
    everywhere, problems = find_sites(reads, family, checkpoint)
    sites = [site for site in everywhere if _place(site.name, checkpoint)]
    problems = [text for text in problems if text.split("`")[1] in stream.norms]
    norms = [site for site in sites if site.fold.producer in stream.norms]
    places = {read.name: _place(read.name, checkpoint) for read in reads}
    try:
        embeddings, final_norm, head = _ends(reads, stream, checkpoint)
    except UnsupportedError as error:
        errors.append(error)
        return None
    is_tied = head is None
    if head is None:
        embeddings = replace(embeddings, parts=embeddings.parts + 1)
        head = replace(embeddings, name=stream.head + WEIGHT_SUFFIX)
    last = Norm(final_norm, any(site.fold.kind == "1 + norm" for site in norms), (head,))
    found = StreamReads(
        embeddings.shape[-1],
        embeddings,
        (*(Norm(site.givers[0], site.fold.kind == "1 + norm", site.readers) for site in norms), last),
        tuple(read for read in reads if module_of(places[read.name]) in stream.writers),
        head,
        is_tied,
    )
    problems += _misfits(found, norms)
    strays = list(_strays(places, found, sites, stream))
    if strays:
        problems.append(f"the family's table does not say whether the stream goes through {some(strays)}")
    errors += [UnsupportedError(f"--rotate: {problem}", hint="convert without --rotate") for problem in problems]
    return None if problems else found


def _place(name: str, checkpoint: Checkpoint) -> str:
    """A name relative to its layer, numbers as `N`; empty outside of the layers that config.json counts."""
    prefix, count = layer_of(name), checkpoint.text_config.get("num_hidden_layers")
    if prefix is None or not isinstance(count, int) or int(prefix.split(".")[-2]) >= count:
        return ""
    return template_of(name[len(prefix) :])


def _ends(reads: Sequence[Read], stream: Stream, checkpoint: Checkpoint) -> tuple[Read, Read, Read | None]:
    """Embeddings, final norm and head; no head where it is tied to the embeddings. Raises `UnsupportedError`."""
    by_name = {read.name: read for read in reads}
    tables = [name for name in by_name if re.search(rf"(^|\.){re.escape(stream.embeddings)}\.weight$", name)]
    if len(tables) != 1:
        raise UnsupportedError(f"--rotate: expected one `{stream.embeddings}.weight`, got {len(tables)}")
    stem = tables[0].removesuffix(stream.embeddings + WEIGHT_SUFFIX)
    norm, head = by_name.get(f"{stem}{stream.final_norm}{WEIGHT_SUFFIX}"), by_name.get(stream.head + WEIGHT_SUFFIX)
    if norm is None:
        raise UnsupportedError(
            f"--rotate: expected `{stem}{stream.final_norm}{WEIGHT_SUFFIX}`, the norm before the head"
        )
    names = checkpoint.config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "none"
    untied = checkpoint.config.get("tie_word_embeddings", checkpoint.text_config.get("tie_word_embeddings")) is False
    if head is None and (untied or not architecture.endswith(_WITH_HEAD)):
        raise UnsupportedError(
            f"--rotate: expected a head that reads the stream last, stored as `{stream.head}.weight` or tied to the "
            f"embeddings of a model `*{_WITH_HEAD}`, got architecture `{architecture}` without: its output is the "
            "stream itself, which would come out rotated"
        )
    return by_name[tables[0]], norm, head


def _misfits(found: StreamReads, norms: Sequence[Site]) -> Iterator[str]:
    """What cannot be as the table says."""
    biased = [site.name for site in norms if len(site.givers) > 1]
    if biased:
        yield f"norms with a bias do more than divide by a length: {some(biased)}"
    width = found.width
    wrong = [norm.read.name for norm in found.norms if norm.read.shape != (width,)]
    wrong += [read.name for norm in found.norms for read in norm.readers if read.shape[1:] != (width,)]
    wrong += [read.name for read in found.writers if read.shape[0] != width]
    if wrong:
        yield f"the embeddings have {width} channels, which does not fit {some(wrong)}"
    if len(found.norms) < 2 or not found.writers:
        yield "no layer has the norms and the outputs that the family's table speaks of"


def _strays(places: dict[str, str], found: StreamReads, sites: Sequence[Site], stream: Stream) -> Iterator[str]:
    """Tensors that are in no place of the table."""
    known = {found.embeddings.name, found.head.name, *(read.name for read in found.writers)}
    known |= {norm.read.name for norm in found.norms} | {r.name for norm in found.norms for r in norm.readers}
    for site in sites:
        known |= {read.name for read in site.readers}
        known |= {read.name for read in site.givers} if site.fold.kind != "rows" else set()
    modules = {module_of(name) for name in known}
    seen = set()
    for name, place in places.items():
        is_bias = name.endswith(".bias") and module_of(name) in modules
        if name in known or is_bias or any(re.search(pattern, place or name) for pattern in stream.apart):
            continue
        if template_of(name) not in seen:
            seen.add(template_of(name))
            yield name


@dataclass(frozen=True, slots=True)
class ValueReads:
    """What gives attention's values in one layer, and what reads them, in heads of `size`.

    givers: rows from `start` on of each `period` rows (0: of each `size`) are a head's; a bias likewise. reader: each
    `size` columns are a head's.
    """

    givers: tuple[Read, ...]
    reader: Read
    size: int
    start: int = 0
    period: int = 0


def find_values(
    reads: Sequence[Read], stream: Stream, checkpoint: Checkpoint, errors: list[QuantConvertError]
) -> list[ValueReads]:
    """The values of each layer; refusals where the table knows of none, or they do not fit the config."""
    if stream.values is None:
        what = f"attention of `{model_types(checkpoint)[0]}` does more with its values than to average them"
        errors.append(UnsupportedError(f"--rotate r2: {what}", hint="--rotate r1"))
        return []
    by_name = {read.name: read for read in reads}
    places = [name for name in by_name if _place(name, checkpoint) == stream.values.reader + WEIGHT_SUFFIX]
    found = {name: _values(by_name, name, stream.values, checkpoint.text_config) for name in places}
    wrong = [name for name, values in found.items() if values is None]
    if wrong or not found:
        what = some(wrong) or f"`{stream.values.reader}`, of which there is none"
        errors.append(
            UnsupportedError(f"--rotate r2: config.json does not explain the heads of {what}", hint="--rotate r1")
        )
    return [values for values in found.values() if values is not None]


def _values(by_name: Mapping[str, Read], name: str, table: Values, config: Mapping[str, Any]) -> ValueReads | None:
    """The values that the weight `name` reads; None where its shape or theirs is not what the config says."""
    reader = by_name[name]
    stem = name.removesuffix(table.reader + WEIGHT_SUFFIX) + table.giver
    givers = [by_name[stem + suffix] for suffix in (WEIGHT_SUFFIX, ".bias") if stem + suffix in by_name]
    heads = config.get("num_attention_heads")
    width = reader.shape[-1] // heads if type(heads) is int and heads > 0 else None
    size = config.get(table.head) if table.head else width
    before = config.get(table.before) if table.before else 0
    if type(size) is not int or type(before) is not int or min(size, before + 1) < 1 or not givers:
        return None
    period = before + size
    if reader.shape[-1] % size or any(giver.shape[0] % period for giver in givers) or (before and len(givers) > 1):
        return None
    return ValueReads(tuple(givers), reader, size, before, period if before else 0)
