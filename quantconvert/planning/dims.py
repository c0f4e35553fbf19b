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
    def row_of(template: str) -> Dims | None:
        return next((row for row in rows if re.search(row.pattern, template)), None)

    seen: set[str] = set()
    for source in sources.tensors:
        if len(source.shape) != 2 or not source.name.endswith(WEIGHT_SUFFIX):
            continue
        template = template_of(source.name.removesuffix(WEIGHT_SUFFIX))
        row = row_of(template)
        sizes = tuple(config.get(key) for key in (row.out_features, row.in_features)) if row else ()
        if row is None or template in seen or not all(type(size) is int for size in sizes) or source.shape == sizes:
            continue
        if classifier.role(source).reason is not None:
            continue  # a vision tower has an `mlp` of its own
        seen.add(template)
        errors.append(
            CheckpointError(
                f"tensor `{source.name}` in `{source.file}`: expected shape {list(sizes)} from config.json "
                f"({row.out_features}, {row.in_features}), got {list(source.shape)}",
                hint="this config.json belongs to another checkpoint, or one of the two is damaged",
            )
        )
