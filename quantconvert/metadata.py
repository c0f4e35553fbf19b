"""The YAML at the top of a model card, read as if from an enemy and written as plain YAML.

huggingface_hub's own reader looks for the block with a regular expression that takes hours for a megabyte of line
ends, follows aliases (a kilobyte of which can stand for gigabytes), and lets a key such as `to_dict` replace its
methods.
"""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache
from typing import Any

MAX_NBYTES = 50_000  # yaml takes two seconds for as much at its worst
MAX_VALUES = 20_000
MAX_DEPTH = 20
# Evaluation results of the base model: often longer than all the rest, and not those of the quantized one.
_RESULTS = "model-index:"


@lru_cache(maxsize=1)
def split_card(card: str | None) -> tuple[dict[str, Any], str]:
    """Metadata and text of a model card; metadata is empty where there is none or it is not plain, small YAML.

    The answer is remembered, for several ask: it is not to be changed.
    """
    if card is None:
        return {}, ""
    lines = card.splitlines(keepends=True)
    if not lines or lines[0].strip("\ufeff \t\r\n") != "---":
        return {}, card
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return {}, card
    metadata = _parse("".join(_without_results(lines[1:end])))
    return ({}, card) if metadata is None else (metadata, "".join(lines[end + 1 :]))


def metadata_block(metadata: dict[str, Any]) -> str:
    """YAML for the front matter of a model card, ending in a newline."""
    import yaml

    return str(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True))


def _without_results(lines: list[str]) -> list[str]:
    """The lines without the top-level key `model-index`: from it to the next line that begins in the first column."""
    kept, inside = [], False
    for line in lines:
        if not line.startswith((" ", "-", "\r", "\n")):
            inside = line.startswith(_RESULTS)
        if not inside:
            kept.append(line)
    return kept


def _parse(block: str) -> dict[str, Any] | None:
    if len(block) > MAX_NBYTES:
        return None
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    try:
        value = yaml.load(block, Loader)
    except Exception:  # yaml errors of every kind; a strange card is no reason to refuse a model
        return None
    value = {} if value is None else value
    return value if isinstance(value, dict) and _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    """Whether this is what JSON could hold (and dates), with names as keys, and neither deep nor large."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    return False
                inside += item.values()
            elif isinstance(item, list):
                inside += item
            elif not isinstance(item, (str, float, date, type(None))) and not _is_small_int(item):
                return False
        count += len(inside)
        if not inside or count > MAX_VALUES:
            return not inside
        level = inside
    return False


def _is_small_int(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**64


_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def base_model_of(metadata: dict[str, Any]) -> str | None:
    """The card's `base_model` where it is one repository's name."""
    name = metadata.get("base_model")
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def tags_of(metadata: dict[str, Any]) -> list[str]:
    """The card's tags that are words."""
    tags = metadata.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
