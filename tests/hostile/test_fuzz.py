"""Mutations of real headers and indexes: nothing but our own refusals comes out, and what is accepted is what
safetensors' own reader accepts. QUANTCONVERT_FUZZ_SECONDS sets how long, QUANTCONVERT_FUZZ_SEED with which numbers.

What it finds becomes a case in `cases.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import time
from collections import Counter
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from quantconvert.checkpoint import TensorRef, load_checkpoint
from quantconvert.checkpoint.header import read_header
from quantconvert.errors import QuantConvertError
from tests.hostile.build import INDEX
from tests.hostile.memory_repo import MemoryRepo
from tests.raw_files import entry

SECONDS = float(os.environ.get("QUANTCONVERT_FUZZ_SECONDS", "5"))
SEED = int(os.environ.get("QUANTCONVERT_FUZZ_SEED", "0")) or time.time_ns()
# Where we are stricter than safetensors on purpose, by the words of the refusal.
STRICTER = ("names `", "control characters", "unknown key", "a name of ", "at most 32 sizes", "`__metadata__`",
            "deeply", "too large", "too many", "-0 is no whole number")  # fmt: skip
Read = dict[str, tuple[str, tuple[int, ...], int]]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, 1.5, float("nan"), float("inf"),
    "", "a", "BF16", "F4", "F6_E2M3", "../x", "\x00", "\x1b[2J", "\ud800", "\u4e2d", [], [0], [0, 0], [1] * 40, {},
    {"a": 1},
)  # fmt: skip
TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"-0", b"-", b"1e9", b"1e999",
          b"NaN", b"0", b"00", b"9" * 30, b"\x00", b"\xff", b"\xc0\xaf", b"\n", b" ", b'"__metadata__":', b'"dtype"',
          b"null", b"true", b"Infinity", b"/*", b"'", b'"shape":[0]', b"\xef\xbb\xbf")  # fmt: skip

NUMBERS = (b"0", b"-0", b"00", b"01", b"+1", b"1.0", b"1e1", b"0x1", b"1_0", b"8", b"NaN", b"9" * 20, b"9" * 5000,
           b"true", "\u0661".encode())  # fmt: skip


def seeds() -> list[dict[str, Any]]:
    """Headers as writers make them, by kind."""
    layer = {"model.layers.0.mlp.up_proj.weight": entry(0, 64, [4, 8]), "model.norm.weight": entry(64, 80)}
    return [
        {"__metadata__": {"format": "pt"}, **layer},
        {"b": entry(0, 16, [2, 4]), "empty": entry(16, 16, [0, 4]), "c": entry(16, 20, [], "F32")},
        {"packed": entry(0, 16, [32], "F4"), "codes": entry(16, 24, [8], "I8"), "e": entry(24, 24, [0], "U8")},
        {"a.b/../c": entry(0, 2, [1, 1, 1]), "\u4e2d\u6587": entry(2, 4)},
        {},
    ]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert at a few places."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(5):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                del raw[at : at + rng.choice((1, 2, 8))]
            case 2:
                raw[at:at] = rng.choice(TOKENS)
            case 3:
                raw[at:at] = raw[at : at + rng.randrange(1, 40)]
            case _:
                numbers = [match.span() for match in re.finditer(rb"(?<=[\[, ])\d+", raw)]
                if numbers:
                    raw[slice(*rng.choice(numbers))] = rng.choice(NUMBERS)
    return bytes(raw)


def mutate_tree(value: Any, rng: random.Random) -> Any:
    """Put a strange value somewhere into a copy of `value`, drop something, or give it another name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        items = dict(value)
        match rng.randrange(6):
            case 0:
                del items[key]
            case 1:
                items[rng.choice((key + "x", "", "__metadata__", "\x1b[2J", "\ud800", "n" * 1001, "dtype"))] = items[
                    key
                ]
            case _:
                items[key] = mutate_tree(items[key], rng)
        return items
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_tree(value[at], rng), *value[at + rng.randrange(2) :]]
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice((-16, -8, -2, -1, 1, 2, 8, 16))
    return rng.choice(VALUES)


def hostile_file(rng: random.Random) -> bytes:
    """A safetensors file with something wrong, or, rarely, nothing."""
    tree = rng.choice(seeds())
    nbytes = max((e["data_offsets"][1] for name, e in tree.items() if name != "__metadata__"), default=0)
    for _ in range(rng.choice((0, 1, 1, 2))):
        tree = mutate_tree(tree, rng)
    apart = rng.choice(((",", ":"), (",", ":"), (", ", ": ")))  # as writers do, and as few do
    raw = json.dumps(tree, ensure_ascii=rng.random() < 0.7, separators=apart).encode("utf-8", "surrogatepass")
    if rng.random() < 0.5:
        raw = mutate_bytes(raw, rng)
    raw += b" " * rng.choice((0, 0, -len(raw) % 8))
    length = len(raw) if rng.random() < 0.95 else rng.choice((0, 1, len(raw) + 1, 2**32, 2**63, 2**64 - 1))
    data = bytes(max(0, nbytes + rng.choice((0, 0, 0, 0, 0, -1, 1, 8))))
    file = struct.pack("<Q", length) + raw + data
    return file[: rng.randrange(len(file))] if rng.random() < 0.03 else file


def theirs(data: bytes) -> Read | None:
    """What safetensors reads: dtype, shape and number of bytes by name; None where it refuses."""
    try:
        return {name: (e["dtype"], tuple(e["shape"]), len(e["data"])) for name, e in deserialize(data)}
    except (SafetensorError, OverflowError, UnicodeError):
        return None


def check_header(data: bytes) -> str:
    """Read one file both ways; returns the kind of answer, for the count."""
    other = theirs(data)
    try:
        refs = read_header(lambda offset, n: data[offset : offset + n], "x.safetensors", len(data))
    except QuantConvertError as refusal:
        message = refusal.message
    else:
        check_accepted(refs, data, other)
        return "accepted"
    assert "x.safetensors" in message
    assert len(message) < 3000
    assert other is None or any(words in message for words in STRICTER), (message, other)
    return "refused"


def check_accepted(
    refs: list[TensorRef], data: bytes, other: dict[str, tuple[str, tuple[int, ...], int]] | None
) -> None:
    """The tensors cover the data part once, in order, and safetensors reads the same ones."""
    position = 8 + struct.unpack("<Q", data[:8])[0]
    for ref in refs:
        assert ref.offset == position
        position += ref.nbytes
    assert position == len(data)
    assert {r.name: (r.dtype, r.shape, r.nbytes) for r in refs} == other


def hostile_repo(rng: random.Random) -> MemoryRepo:
    """Two shards, an index and a config, one or more of them mutated."""
    shards = {"one.safetensors": {"a": entry(0, 16)}, "two.safetensors": {"b": entry(0, 4), "c": entry(4, 8)}}
    contents = {}
    for name, tree in shards.items():
        raw = json.dumps(tree).encode()
        nbytes = max(e["data_offsets"][1] for e in tree.values())
        contents[name] = struct.pack("<Q", len(raw)) + raw + bytes(nbytes)
    index = {"metadata": {"total_size": 24}, "weight_map": {n: f for f, tree in shards.items() for n in tree}}
    config = {"model_type": "llama", "num_hidden_layers": 2, "text_config": {"model_type": "x"},
              "quantization_config": {"quant_method": "gptq", "bits": 4}}  # fmt: skip
    for name, value in ((INDEX, index), ("config.json", config)):
        for _ in range(rng.choice((0, 1, 1, 2))):
            value = mutate_tree(value, rng)
        raw = json.dumps(value).encode()
        contents[name] = mutate_bytes(raw, rng) if rng.random() < 0.3 else raw
    if rng.random() < 0.2:
        contents["one.safetensors"] = hostile_file(rng)
    if rng.random() < 0.2:
        contents[rng.choice(("../x", "a//b", "/etc/x", "x\n", "", "model.safetensors", "x.bin"))] = b"{}"
    return MemoryRepo(contents, lie=rng.choice((0,) * 15 + (1000,)))


def check_repo(repo: MemoryRepo) -> str:
    """Load one repository; whatever is accepted is fit to be planned, copied and written."""
    try:
        checkpoint = load_checkpoint(repo)
    except QuantConvertError as refusal:
        message = refusal.message
    else:
        read = {file.path for file in checkpoint.weight_files}
        assert {ref.file for ref in checkpoint.tensors} <= read <= set(repo.contents)
        copied = {file.path for file in (*checkpoint.side_files, *checkpoint.dropped_files)}
        assert copied <= {"one.safetensors", "two.safetensors", "model.safetensors", "x.bin"}
        assert checkpoint.model_type.isprintable()
        json.dumps(checkpoint.config, ensure_ascii=False).encode()
        return "accepted"
    assert len(message) < 20_000
    assert all(c == "\n" or c.isprintable() for c in message)
    return "refused"


@pytest.mark.parametrize("what", ["header", "repository"])
def test_fuzz(what: str) -> None:
    rng = random.Random(SEED)
    counts: Counter[str] = Counter()
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end or min(counts["refused"], counts["accepted"]) == 0:
        state = rng.getstate()
        try:
            if what == "header":
                data = hostile_file(rng)
                counts[check_header(data)] += 1
            else:
                counts[check_repo(hostile_repo(rng))] += 1
        except BaseException:
            rng.setstate(state)
            print(
                f"seed {SEED}, after {sum(counts.values())}:",
                hostile_file(rng) if what == "header" else hostile_repo(rng).contents,
            )
            raise
    print(f"{what}: {dict(counts)} with seed {SEED}")
