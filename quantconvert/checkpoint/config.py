"""config.json: bounded, well-formed, and of the types that the rest of the program counts on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantconvert.checkpoint.contents import QUANTIZATION_KEYS
from quantconvert.checkpoint.header import is_utf8
from quantconvert.errors import CheckpointError
from quantconvert.text import quoted

MAX_CONFIG_NBYTES = 10_000_000
MAX_DEPTH = 64
MAX_WORD_LENGTH = 200
MAX_COUNT = 10**6
MAX_INTEGER_BITS = 1024  # what a double can hold; other readers' JSON stops there or long before


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_WORD_LENGTH and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_Check = tuple[Callable[[object], bool], str]
_WORD: _Check = (_is_word, f"a text of at most {MAX_WORD_LENGTH} characters")
_OBJECT: _Check = (_is_object, "an object")
# What is decided by these must not be decided by accident: a block that is no object would pass for none.
_KEYS: dict[str, _Check] = {
    "model_type": _WORD,
    "num_hidden_layers": (_is_count, f"a whole number up to {MAX_COUNT}"),
    "text_config": _OBJECT,
    **dict.fromkeys(QUANTIZATION_KEYS, _OBJECT),
}


def check_config(config: dict[str, Any], file: str) -> None:
    """Raise `CheckpointError` for values that nothing later is prepared for; null is as good as absent."""
    _check_tree(config, file)
    parts: list[tuple[str, Any]] = [(f"`{file}`", config), (f"text_config of `{file}`", config.get("text_config"))]
    for where, part in parts:
        for key, (fits, expected) in _KEYS.items() if part else ():
            _check_value(where, key, part.get(key), fits, expected)
        for key in QUANTIZATION_KEYS if part else ():
            block = part.get(key)
            if block:
                _check_value(f"{key} of {where}", "quant_method", block.get("quant_method"), *_WORD)


def _check_value(where: str, key: str, value: object, fits: Callable[[object], bool], expected: str) -> None:
    if value is not None and not fits(value):
        raise CheckpointError(f"{where}: expected {expected} as `{key}`, got {quoted(value)}")


def _check_tree(value: Any, file: str) -> None:
    """Depth, text and numbers of everything inside: the config is written again, by writers that recurse, in UTF-8.

    Infinity is no JSON either, but transformers writes and reads it (`time_step_limit` of Mamba-2 and its kin).
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += item.keys()
                inside += item.values()
            elif isinstance(item, list):
                inside += item
            elif isinstance(item, str) and not is_utf8(item):
                raise CheckpointError(f"`{file}` holds text that is not UTF-8: {quoted(item)}")
            elif item != item:
                raise CheckpointError(f"`{file}` holds NaN, which is no number of JSON: expected a value or null")
            elif isinstance(item, int) and item.bit_length() > MAX_INTEGER_BITS:
                raise CheckpointError(f"`{file}` holds a whole number of more than {MAX_INTEGER_BITS} bits")
        level = inside
        if not level:
            return
    raise CheckpointError(f"`{file}` is nested too deeply: expected at most {MAX_DEPTH} levels")
