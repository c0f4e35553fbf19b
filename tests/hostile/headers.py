"""Malformed headers and shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.hostile.build import GOOD, LAYER, NBYTES, SINGLE, Case, empty_tensors
from tests.raw_files import entry, shard


def header(name: str, content: bytes | dict[str, Any], says: str, data: int = 16, length: int | None = None) -> Case:
    return Case(f"header: {name}", lambda folder: shard(folder / SINGLE, content, data, length), says)


H = f"header of `{SINGLE}`"
A = f"tensor `a` in `{SINGLE}`"
SIZES = f"{A}: shape is not a list of at most 32 sizes"
OFFSETS = f"{A}: data_offsets is not a pair of offsets"
NOT_MAP = f"{H}: `__metadata__` is not a map from strings to strings"


def one(**changes: Any) -> dict[str, Any]:
    """A header of one tensor `a` with something wrong."""
    return {"a": entry(0, 16) | changes}


def raw_one(shape: str = "[8]", offsets: str = "[0,16]", more: str = "") -> bytes:
    """The same as text, for what `json.dumps` does not write."""
    return f'{{"a":{{"dtype":"BF16","shape":{shape},"data_offsets":{offsets}{more}}}}}'.encode()


HEADERS = [
    header("length 2^63", b"{}", f"{H} is too large: expected at most 25000000 bytes, got {2**63}", length=2**63),
    header("length 2^64 - 1", b"{}", f"{H} is too large", length=2**64 - 1),
    header("length 0", b"", f"{H} is not JSON: Expecting value"),
    header("length past the end", b"{}", f"`{SINGLE}` is truncated: its header needs 108 bytes", length=100),
    header("spaces only", b" " * 64, f"{H} is not JSON: Expecting value"),
    header("zero bytes", b"\0" * 64, f"{H} is not JSON"),
    header("a pickle", b"\x80\x04\x95cposix\nsystem\n", f"{H} is not UTF-8"),
    header("byte order mark", b"\xef\xbb\xbf{}", f"{H} is not JSON"),
    header("UTF-16", "{}".encode("utf-16"), f"{H} is not UTF-8"),
    header("overlong UTF-8", b'{"\xc0\xaf":{}}', f"{H} is not UTF-8"),
    header("two objects", b"{}{}", f"{H} is not JSON: Extra data"),
    header("a bare string", b'"model"', f"{H} is not a JSON object"),
    header("deep lists", b'{"a":' + b"[" * 100_000, f"{H} is not JSON: nested too deeply"),
    header("deep objects", b'{"a":' * 100_000, f"{H} is not JSON: nested too deeply"),
    header("millions of lists", b'{"a":[' + b"[]," * 4_000_000 + b"[]]}", f"{H} holds too many values"),
    header("millions of objects", b'{"a":[' + b'{"b":1},' * 2_000_000 + b"{}]}", f"{H} holds too many values"),
    header("rare wide character", b'{"' + b"x" * 24_000_000 + "\U0001f600".encode() * 100_000 + b'":1}',
           f"{H} has a name of 24100000 characters"),
    header("wide characters", b'{"' + "\u4e2d".encode() * 8_000_000 + b'":1}', f"{H} has a name of 8000000 characters"),
    header("duplicate tensor", b'{"a":{},"a":{}}', f"{H} names `a` twice"),
    header("duplicate key of a tensor", raw_one(more=',"dtype":"F32"'), f"{H} names `dtype` twice"),
    header("duplicate long key", b'{"%b":1,"%b":2}' % (b"k" * 10**6, b"k" * 10**6),
           f"{H} names `{'k' * 120}...` twice"),
    header("NaN as size", raw_one(shape="[NaN]"), f"{H} is not JSON: NaN is no number of JSON"),
    header("Infinity as offset", raw_one(offsets="[0,Infinity]"), f"{H} is not JSON: Infinity is no number of JSON"),
    header("1e999 as offset", raw_one(offsets="[0,1e999]"), OFFSETS),
    header("-0 as offset", raw_one(offsets="[-0,16]"), f"{H} is not JSON: -0 is no whole number"),
    header("-0 where nobody looks", raw_one(more=',"x":[-0]'), f"{H} is not JSON: -0 is no whole number"),  # fuzz
    header("10,000 digits", raw_one(shape=f"[{'9' * 10_000}]"), f"{H} is not JSON: a number of too many digits"),
    header("4,000 digits", raw_one(shape=f"[{'9' * 4000}]"), SIZES),
    header("metadata a list", {"__metadata__": [], **one()}, NOT_MAP),
    header("metadata of numbers", {"__metadata__": {"format": 1}, **one()}, NOT_MAP),
    header("metadata half a pair", b'{"__metadata__":{"x":"\\ud800"}}', NOT_MAP),
    header("metadata is a tensor", {"__metadata__": entry(0, 16)}, NOT_MAP),
    header("tensor null", {"a": None}, f"{A}: expected an object with dtype, shape and data_offsets"),
    header("no dtype", {"a": {"shape": [8], "data_offsets": [0, 16]}}, f"{A}: unknown dtype `None`"),
    header("dtype of nothing", {"a": {"dtype": "a", "shape": [0], "data_offsets": [0, 0]}}, f"{A}: unknown dtype `a`"),
    header("dtype a long text", one(dtype="B" * 10**6), f"{A}: unknown dtype `{'B' * 120}...`"),
    header("dtype with an escape", one(dtype="\x1b[2J\nerror"), f"{A}: unknown dtype `\\x1b[2J\\nerror`"),
    header("dtype a large list", one(dtype=[0] * 10**5), f"{A}: unknown dtype `a list of 100000`"),
    header("unknown key", one(strides=[1]), f"{A}: unknown key `strides`"),
    header("shape a text", one(shape="8"), SIZES),
    header("shape of texts", one(shape=["8"]), SIZES),
    header("shape nested", one(shape=[[8]]), SIZES),
    header("rank 1000", one(shape=[1] * 999 + [8]), SIZES),
    header("product 2^64 + 16 bytes", one(shape=[2**32, 2**31]), f"{A}: BF16 of shape [4294967296, 2147483648] needs"),
    header("product of 32 sizes", one(shape=[2**62] * 32), f"{A}: BF16 of shape [4611686018427387904, "),
    header(
        "2^64 before a zero",
        {"a": {"dtype": "U8", "shape": [2**32 + 8, 2**32, 0], "data_offsets": [0, 0]}},
        f"{A}: shape [4294967304, 4294967296, 0] has more elements than safetensors counts",
    ),
    header("half a byte", one(dtype="F4", shape=[31]), f"{A}: F4 of shape [31] needs 16 bytes"),
    header("no elements, but bytes", one(shape=[0]), f"{A}: BF16 of shape [0] needs 0 bytes"),
    header("no elements, far away", {"a": entry(0, 16), "b": entry(99, 99)}, f"{H} lies about offsets: tensor `b`"),
    header("offsets an object", one(data_offsets={"begin": 0, "end": 16}), OFFSETS),
    header("three offsets", one(data_offsets=[0, 16, 16]), OFFSETS),
    header("offsets of booleans", one(data_offsets=[False, True]), OFFSETS),
    header("offset 2^63", one(data_offsets=[2**63 - 16, 2**63]), OFFSETS),
    header("end before the data", one(data_offsets=[-16, 0]), OFFSETS),
    header("the same bytes twice", {"a": entry(0, 16), "b": entry(0, 16)}, f"{H} lies about offsets: tensor `b` over"),
    header("inside another", {"a": entry(0, 16), "b": entry(4, 8)}, f"{H} lies about offsets: tensor `b` overlaps"),
    header("gap of a byte", {"a": entry(0, 8), "b": entry(9, 17)}, f"{H} lies about offsets: tensor `b` leaves", 17),
    header("terabytes past the end", {"a": entry(0, 2**42)}, f"`{SINGLE}` is truncated: tensor `a` ends at byte"),
    header("nothing but a rest", b"{}", f"{H} does not cover the file: tensors end at byte 10, the file has 26"),
    header("name with NUL", b'{"a\\u0000b":{}}', f"{H} has a name with control characters: `a\\x00b`"),
    header("name with a line end", {"a\nerror: all is lost": {}},
           f"{H} has a name with control characters: `a\\nerror"),
    header("name with an escape", {"\x1b]0;title\x07": {}},
           f"{H} has a name with control characters: `\\x1b]0;title\\x07`"),
    header("name with C1 controls", {"\x9b2J": {}}, f"{H} has a name with control characters: `\\x9b2J`"),
    header("name of half a pair", b'{"\\udfff":{}}', f"{H} has a name that is not UTF-8: `\\udfff`"),
    header("name of 1 MB", {"n" * 10**6: {}}, f"{H} has a name of 1000000 characters"),
    header("name right to left", one() | {"b\u202e": {}}, f"tensor `b\\u202e` in `{SINGLE}`: unknown dtype"),
    header("a million tensors in one file", empty_tensors(10**6), f"{H} is too large", 0),
]  # fmt: skip


def million(folder: Path) -> None:
    (folder / SINGLE).unlink()
    for i in range(50):
        shard(folder / f"model-{i + 1:05d}-of-00050.safetensors", empty_tensors(20_000, i * 20_000))


def wide(folder: Path) -> None:
    """Small headers each, 120 MB together."""
    for i in range(6):
        shard(folder / f"x{i}.safetensors", b'{"' + b"x" * 20_000_000 + b'":1}')
    (folder / SINGLE).unlink()


def twice(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "one.safetensors")
    shard(folder / "two.safetensors", GOOD, NBYTES)


def many_twice(folder: Path) -> None:
    for name in ("one", "two"):
        shard(folder / f"{name}.safetensors", empty_tensors(5000))
    (folder / SINGLE).unlink()


def many_broken(folder: Path) -> None:
    """A thousand files that are no shards: ten are enough to say so."""
    for i in range(1000):
        (folder / f"x{i:03}.safetensors").write_bytes(b"<html>")
    (folder / SINGLE).unlink()


SHARDS = [
    Case("shards: a thousand broken ones", many_broken,
         "`x009.safetensors` is a web page, not the weights", "Refusal"),
    Case("shards: a million tensors", million, "`{source}` has too many tensors: expected at most 500000"),
    Case("shards: headers too large in all", wide, "headers of `{source}` are too large: expected at most 100000000"),
    Case("shards: a tensor in two", twice, f"tensor `{LAYER}` exists twice: in `one.safetensors` and in"),
    Case("shards: thousands in two", many_twice, "tensor `a9` exists twice: in `one.safetensors`", "Refusal"),
    Case("shards: one of a million",
         lambda folder: (folder / SINGLE).rename(folder / "m-00001-of-999999.safetensors"),
         "shards [2, 3, 4, 5, 6] of 999999 are missing in `{source}`"),
]  # fmt: skip
