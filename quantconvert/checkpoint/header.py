"""Reading safetensors headers as if from an enemy: every number is checked before it is used.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps
(huggingface/safetensors README, "Format", and `safetensors/src/tensor.rs`, `Metadata::validate`).
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, repeat
from math import prod
from operator import add, itemgetter, mul
from typing import Any, NamedTuple

from quantconvert.checkpoint.compact import dtype_and_shape, split_header
from quantconvert.dtypes import DTYPES
from quantconvert.errors import CheckpointError
from quantconvert.text import is_plain, quoted

# One header of 200,000 tensors fits (Kimi-K2 has as many in 62 files), and so does what parsing it takes in 300 MB;
# safetensors itself reads up to 100 MB.
MAX_HEADER_NBYTES = 25_000_000
MAX_TEXT_NBYTES = 110_000_000
MAX_VALUES = 3_000_000
MAX_NAME_LENGTH = 256  # the longest public ones have half of it; name rules take time that grows with the square
MAX_RANK = 32
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}


class TensorRef(NamedTuple):
    """Bytes that exist: `nbytes` at `offset` (from the start of `file`) hold a tensor of `dtype` and `shape`.

    A named tuple, as a large checkpoint has a hundred thousand: a frozen dataclass takes five times as long to make.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


class _DuplicateKey(ValueError):
    """A key given twice; `str` of it is the key."""


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads` that refuses a key given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return result


def read_header(read: Callable[[int, int], bytes], file: str, file_nbytes: int) -> list[TensorRef]:
    """The tensors of one safetensors file, in the order of their bytes.

    `read(offset, nbytes)` returns bytes of the file; `file` is the name used in the refs and in errors. Raises
    `CheckpointError` for anything that is not a well-formed file of exactly `file_nbytes` bytes.
    """
    return parse_header(header_text(read, file, file_nbytes), file, file_nbytes)


def header_text(read: Callable[[int, int], bytes], file: str, file_nbytes: int) -> bytes:
    """The header's JSON, not parsed yet; raises `CheckpointError` for a length that cannot be."""
    if file_nbytes < 8:
        raise CheckpointError(f"`{file}` is no safetensors file: expected at least 8 bytes, got {file_nbytes}")
    (header_nbytes,) = struct.unpack("<Q", _exactly(read, 0, 8, file))
    if header_nbytes > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"header of `{file}` is too large: expected at most {MAX_HEADER_NBYTES} bytes, got {header_nbytes}"
        )
    if 8 + header_nbytes > file_nbytes:
        raise CheckpointError(
            f"`{file}` is truncated: its header needs {8 + header_nbytes} bytes, the file has {file_nbytes}"
        )
    return _exactly(read, 8, header_nbytes, file)


def parse_header(raw: bytes, file: str, file_nbytes: int) -> list[TensorRef]:
    """The tensors that the header `raw` of `file` describes, in the order of their bytes."""
    subject = f"header of `{file}`"
    _check_count(raw, subject, MAX_VALUES)
    usual = _usual_refs(raw, file, file_nbytes)
    if usual is not None:
        return usual
    data_start = 8 + len(raw)
    entries = parse_object(raw, subject, strict=True)
    del raw
    _check_metadata(entries.pop("__metadata__", None), file)
    refs = [_checked_ref(name, entry, file, data_start) for name, entry in entries.items()]
    del entries
    refs.sort(key=itemgetter(4, 5))  # by offset; of those without a byte, first
    _check_layout(refs, file, data_start, file_nbytes)
    return refs


def _check_count(raw: bytes, subject: str, max_values: int) -> None:
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > max_values:
        raise CheckpointError(f"{subject} holds too many values: expected at most {max_values}")


def metadata_of(raw: bytes, file: str) -> dict[str, str]:
    """The `__metadata__` of the header `raw` of `file`, which `parse_header` has accepted; empty where it has none."""
    metadata: dict[str, str] = parse_object(raw, f"header of `{file}`", strict=True).get("__metadata__") or {}
    return metadata


def parse_object(raw: bytes, subject: str, strict: bool = False, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object with unique keys; `subject` begins the message of the `CheckpointError` otherwise.

    max_values: of commas, colons and opening brackets, counted before anything is parsed.

    strict: refuse what Python reads beyond the JSON standard, NaN and infinities (configs do hold them), and `-0`,
    which is no whole number to other readers.
    """
    _check_count(raw, subject, max_values)
    colons = raw.count(b":")
    try:
        text = raw.decode("utf-8")
        del raw
        if sys.getsizeof(text) > MAX_TEXT_NBYTES:  # four bytes a character once one of them is rare
            raise CheckpointError(f"{subject} is too large: expected at most {MAX_TEXT_NBYTES} bytes in memory")
        whole = _whole if strict and "-0" in text else None
        constant = _no_constant if strict else None
        value = json.loads(text, parse_constant=constant, parse_int=whole)
        if colons != _num_pairs(value):  # a colon in a string, a deeper object; or a key given twice
            value = json.loads(text, object_pairs_hook=_unique_object, parse_constant=constant, parse_int=whole)
    except _DuplicateKey as error:
        raise CheckpointError(f"{subject} names {quoted(str(error))} twice") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{subject} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{subject} is not JSON: {_reason(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{subject} is not a JSON object")
    return value


def _num_pairs(value: object) -> int:
    """Keys of an object and of those right inside it: as many colons has its text at least, and more if one is given
    twice.
    """
    inside = value.values() if isinstance(value, dict) else ()
    return len(inside) + sum(len(part) for part in inside if isinstance(part, dict))


def _exactly(read: Callable[[int, int], bytes], offset: int, nbytes: int, file: str) -> bytes:
    data = read(offset, nbytes)
    if len(data) != nbytes:
        raise CheckpointError(
            f"`{file}` became shorter while it was read: expected {nbytes} bytes at {offset}, got {len(data)}"
        )
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of too many digits" if "int_max_str_digits" in str(error) else str(error)


def _check_metadata(metadata: object, file: str) -> None:
    """As safetensors reads it: absent, or strings by name."""
    strings = isinstance(metadata, dict) and all(type(v) is str and is_utf8(k + v) for k, v in metadata.items())
    if metadata is not None and not strings:
        raise CheckpointError(f"header of `{file}`: `__metadata__` is not a map from strings to strings")


def is_utf8(text: str) -> bool:
    """Whether `text` can be written: JSON can hold half a surrogate pair (`\\ud800`), UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _overflows(shape: Sequence[int]) -> bool:
    """Whether the sizes before a zero have a product that no 64 bits hold, which safetensors refuses (`Overflow`)."""
    return 0 in shape and any(product >= 2**64 for product in accumulate(shape, mul))


def _check_name(name: str, file: str) -> None:
    if not is_utf8(name):
        raise CheckpointError(f"header of `{file}` has a name that is not UTF-8: {quoted(name)}")
    if not is_plain(name):
        raise CheckpointError(f"header of `{file}` has a name with control characters: {quoted(name)}")
    if len(name) > MAX_NAME_LENGTH:
        raise CheckpointError(f"header of `{file}` has a name of {len(name)} characters: {quoted(name)}")


def _usual_refs(raw: bytes, file: str, file_nbytes: int) -> list[TensorRef] | None:
    """The refs of a header that is written as usual and has nothing wrong; None of any other."""
    columns = split_header(raw)
    if columns is None:
        return None
    names, kinds, begins, ends, metadata = columns
    sizes = {kind: _size(kind) for kind in set(kinds)}
    if None in sizes.values():
        return None
    dtypes, shapes, nbytes = zip(*map(sizes.__getitem__, kinds), strict=True)
    start = 8 + len(raw)
    tiles = begins[0] == 0 and begins[1:] == ends[:-1] and start + ends[-1] == file_nbytes
    if not tiles or list(map(add, begins, nbytes)) != ends:
        return None
    if metadata is not None and not _is_metadata(metadata):
        return None
    offsets = map(start.__add__, begins)
    return list(map(_REF, zip(names, dtypes, shapes, repeat(file), offsets, nbytes, strict=False)))


def _is_metadata(text: str) -> bool:
    """Whether `text` is an object that holds `__metadata__` alone, as that should be."""
    try:
        entries = parse_object(text.encode(), "header", strict=True)
        _check_metadata(entries.pop("__metadata__", None), "header")
    except CheckpointError:
        return False
    return not entries


_REF: Callable[[tuple[Any, ...]], TensorRef] = partial(tuple.__new__, TensorRef)  # `_make`, without a call of Python


@lru_cache(maxsize=4096)
def _size(kind: str) -> tuple[str, tuple[int, ...], int] | None:
    """Dtype, shape and bytes of a tensor, where they are well-formed."""
    dtype, shape = dtype_and_shape(kind) or ("", ())
    if dtype not in DTYPES or len(shape) > MAX_RANK or not all(map(_is_count, shape)) or _overflows(shape):
        return None
    bits = prod(shape) * DTYPES[dtype].bits
    return None if bits % 8 else (dtype, shape, bits // 8)


def _checked_ref(name: str, entry: object, file: str, data_start: int) -> TensorRef:
    _check_name(name, file)
    where = f"tensor `{name}` in `{file}`"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets")
    if not entry.keys() <= _TENSOR_KEYS:
        raise CheckpointError(f"{where}: unknown key {quoted(min(entry.keys() - _TENSOR_KEYS))}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {quoted(dtype)}", hint=f"known dtypes: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: shape is not a list of at most {MAX_RANK} sizes")
    if _overflows(shape):
        raise CheckpointError(f"{where}: shape {shape} has more elements than safetensors counts, before its zero")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets is not a pair of offsets")
    begin, end = offsets
    bits = prod(shape) * DTYPES[dtype].bits
    if begin > end or bits % 8 or bits // 8 != end - begin:
        needed = -(-bits // 8)
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} needs {needed} bytes, its data_offsets {offsets} span {end - begin}"
        )
    return TensorRef(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _check_layout(refs: list[TensorRef], file: str, data_start: int, file_nbytes: int) -> None:
    """Offsets must tile the data part exactly: no overlap, no gap, nothing past the end, nothing left over."""
    position = data_start
    for ref in refs:
        if ref.offset != position:
            kind = "overlaps the tensor before it" if ref.offset < position else "leaves a gap before it"
            raise CheckpointError(
                f"header of `{file}` lies about offsets: tensor `{ref.name}` {kind}: "
                f"expected offset {position - data_start}, got {ref.offset - data_start}"
            )
        position += ref.nbytes
    if position > file_nbytes:
        last = refs[-1].name if refs else "?"
        raise CheckpointError(
            f"`{file}` is truncated: tensor `{last}` ends at byte {position}, the file has {file_nbytes}",
            hint="download or copy this file again",
        )
    if position < file_nbytes:
        raise CheckpointError(
            f"header of `{file}` does not cover the file: tensors end at byte {position}, the file has {file_nbytes}"
        )
