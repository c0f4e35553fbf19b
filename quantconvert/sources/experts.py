"""Weights that families store in shapes of their own: all experts of a layer in one tensor, or matrices as [in, out].

Which axis is which, and how gate and up are ordered, comes from the family's table; the sizes come from the config and
have to agree. Shapes alone decide nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from quantconvert.dtypes import DTYPES
from quantconvert.errors import CheckpointError, QuantConvertError
from quantconvert.families import Family, FusedExperts
from quantconvert.patterns import WEIGHT_SUFFIX, template_of
from quantconvert.sources.read import PLAIN, Read, View
from quantconvert.sources.registry import ENCODINGS

MAX_PARTS = 10_000


def split_read(source: Read, family: Family, config: Mapping[str, Any], errors: list[QuantConvertError]) -> list[Read]:
    """The weights that `source` holds: itself alone, itself turned, or one for each expert and projection."""
    bare = source.name.removesuffix(WEIGHT_SUFFIX)
    rows = sorted(family.fused_experts, key=lambda row: row.experts not in config)  # what the config speaks of first
    for row in rows:
        match = re.search(row.pattern, bare)
        of_bias = re.search(row.pattern, bare.removesuffix(row.bias)) if row.bias and bare.endswith(row.bias) else None
        try:
            if match:
                return list(_experts(source, bare[: match.start()], row, config))
            if of_bias and source.encoding == PLAIN:
                return list(_biases(source, bare[: of_bias.start()], row, config))
        except CheckpointError as error:
            errors.append(error)
            return [source]
    return [_turned(source) if _is_transposed(source, bare, family) else source]


def _turned(source: Read) -> Read:
    """A weight that is stored [in, out]. Integer codes are [out, in] even so; the view says what family that is."""
    out_first = ENCODINGS[source.encoding].out_first
    return replace(source, shape=source.shape if out_first else source.shape[::-1], view=View(transposed=True))


def _is_transposed(ref: Read, bare: str, family: Family) -> bool:
    if len(ref.shape) != 2 or not ref.name.endswith(WEIGHT_SUFFIX) or not DTYPES[ref.dtype].is_weight:
        return False
    return any(re.search(pattern, template_of(bare)) for pattern in family.transposed)


def _experts(source: Read, stem: str, row: FusedExperts, config: Mapping[str, Any]) -> Iterator[Read]:
    experts, out_features, in_features = _sizes(source, row, config)
    count = len(row.projections)
    transposed = row.transposed and not ENCODINGS[source.encoding].out_first
    matrix = (count * out_features, in_features)
    expected = (experts, *(matrix[::-1] if transposed else matrix))
    if source.shape != expected:
        raise CheckpointError(
            f"tensor `{source.name}` in `{source.file}`: expected shape {list(expected)} from config.json "
            f"({row.experts} {experts}, {row.out_features} {out_features}, {row.in_features} {in_features}"
            f"{', stored transposed' if transposed else ''}), got {list(source.shape)}"
        )
    if experts * count > MAX_PARTS:
        raise CheckpointError(f"tensor `{source.name}` in `{source.file}` holds {experts} experts: expected a model's")
    for expert in range(experts):
        for i, projection in enumerate(row.projections):
            start, step = (i, count) if row.interleaved else (i * out_features, 1)
            yield replace(
                source,
                name=f"{stem}.experts.{expert}.{projection}{WEIGHT_SUFFIX}",
                shape=(out_features, in_features),
                view=View(expert, start, step, transposed),
                parts=experts * count,
            )


def _sizes(source: Read, row: FusedExperts, config: Mapping[str, Any]) -> tuple[int, int, int]:
    found = [config.get(key) for key in (row.experts, row.out_features, row.in_features)]
    for key, value in zip((row.experts, row.out_features, row.in_features), found, strict=True):
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"tensor `{source.name}` in `{source.file}` holds all experts of a layer: expected `{key}` in "
                f"config.json to tell its axes, got {value!r}"
            )
    experts, out_features, in_features = found
    return int(experts or 0), int(out_features or 0), int(in_features or 0)


def _biases(ref: Read, stem: str, row: FusedExperts, config: Mapping[str, Any]) -> Iterator[Read]:
    """One vector for each expert and projection."""
    experts, rows, _ = _sizes(ref, row, config)
    count = len(row.projections)
    expected = (experts, count * rows)
    if ref.shape != expected or not DTYPES[ref.dtype].is_weight:
        raise CheckpointError(
            f"tensor `{ref.name}` in `{ref.file}`: expected floats of shape {list(expected)} from config.json "
            f"({row.experts} {experts}, {row.out_features} {rows}), got {ref.dtype} {list(ref.shape)}"
        )
    for expert in range(experts):
        for i, projection in enumerate(row.projections):
            start, step = (i, count) if row.interleaved else (i * rows, 1)
            yield replace(
                ref,
                name=f"{stem}.experts.{expert}.{projection}.bias",
                shape=(rows,),
                view=View(expert, start, step),
                parts=experts * count,
            )
