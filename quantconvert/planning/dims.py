"""Shapes against the config: a checkpoint whose config speaks of other sizes is not the one it says it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from quantconvert.errors import CheckpointError, QuantConvertError
from quantconvert.families import Classifier, Dims
from quantconvert.patterns import WEIGHT_SUFFIX, template_of
from quantconvert.sources import Sources


def check_dims(
    sources: Sources, classifier: Classifier, config: Mapping[str, Any], errors: list[QuantConvertError]
) -> None:
    """Refuse linear weights whose shape is not what the family's table reads from the config; one a kind of layer."""
    rows = classifier.family.dims if classifier.family else ()

    @cache
    def expected(template: str) -> tuple[Dims, tuple[int, int]] | None:
        """The row that speaks of a module, and the sizes that the config gives for it."""
        row = next((row for row in rows if re.search(row.pattern, template)), None)
        sizes = (config.get(row.out_features), config.get(row.in_features)) if row else (None, None)
        return (row, (sizes[0], sizes[1])) if row and type(sizes[0]) is int and type(sizes[1]) is int else None

    seen: set[str] = set()
    right: set[tuple[str, tuple[int, ...]]] = set()
    for source in sources.reads if rows else ():
        if len(source.shape) != 2 or (kind := (template_of(source.name), source.shape)) in right:
            continue
        template = kind[0].removesuffix(WEIGHT_SUFFIX)
        found = expected(template) if kind[0].endswith(WEIGHT_SUFFIX) else None
        if found is None or source.shape == found[1]:
            right.add(kind)
            continue
        if template in seen:
            continue
        if classifier.role(source).reason is not None:
            continue  # a vision tower has an `mlp` of its own
        row, sizes = found
        seen.add(template)
        errors.append(
            CheckpointError(
                f"tensor `{source.name}` in `{source.file}`: expected shape {list(sizes)} from config.json "
                f"({row.out_features}, {row.in_features}), got {list(source.shape)}",
                hint="this config.json belongs to another checkpoint, or one of the two is damaged",
            )
        )
