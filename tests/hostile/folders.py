"""Malformed indexes and configs, and files that should not be there."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.build import CONFIG, GOOD, INDEX, LAYER, NBYTES, SINGLE, Case, indexed, link
from tests.raw_files import shard


def index(name: str, weight_map: object, says: str) -> Case:
    return Case(f"index: {name}", lambda folder: indexed(folder, weight_map), says)


def config(name: str, content: str | bytes | dict[str, Any], says: str, **options: Any) -> Case:
    def spoil(folder: Path) -> None:
        text = json.dumps({"model_type": "llama"} | content) if isinstance(content, dict) else content
        (folder / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)

    return Case(f"config: {name}", spoil, says, options=options)


H = f"header of `{SINGLE}`"
BESIDE = "expected a file beside it"


def huge(name: str) -> Callable[[Path], None]:
    """A sparse file of 1 GB."""

    def spoil(folder: Path) -> None:
        if name == INDEX:
            indexed(folder, {})
        with open(folder / name, "r+b") as file:
            file.truncate(10**9)

    return spoil


def named_folder(folder: Path) -> None:
    indexed(folder, {"b": "three.safetensors"})
    (folder / "three.safetensors").mkdir()


def named_device(folder: Path) -> None:
    indexed(folder, {"b": "three.safetensors"})
    link(folder, "three.safetensors", "/dev/zero")


def named_fifo(folder: Path) -> None:
    indexed(folder, {"b": "three.safetensors"})
    os.mkfifo(folder / "three.safetensors")


INDEXES = [
    Case("index: 1 GB", huge(INDEX), f"`{INDEX}` is too large: expected at most 50000000 bytes, got 1000000000"),
    index("not an object", "[]", f"`{INDEX}` is not a JSON object"),
    index("deep", '{"weight_map":' * 100_000, f"`{INDEX}` is not JSON: nested too deeply"),
    index("map a list", ["one.safetensors"], f"`{INDEX}` has no weight_map from tensor names to file names"),
    index("map to lists", {LAYER: ["one.safetensors"]}, f"`{INDEX}` has no weight_map"),
    index("duplicate tensor", '{"weight_map":{"b":"one.safetensors","b":"two.safetensors"}}',
          f"`{INDEX}` names `b` twice"),
    index("up", {"b": "../two.safetensors"}, f"`{INDEX}` names `../two.safetensors`: {BESIDE}"),
    index("up and down", {"b": "x/../two.safetensors"}, f"`{INDEX}` names `x/../two.safetensors`: {BESIDE}"),
    index("a device", {"b": "/dev/zero"}, f"`{INDEX}` names `/dev/zero`: {BESIDE}"),
    index("a backslash", {"b": "..\\two.safetensors"}, f"`{INDEX}` names `..\\two.safetensors`: {BESIDE}"),
    index("NUL", {"b": "two\0.safetensors"}, f"`{INDEX}` names `two\\x00.safetensors`: {BESIDE}"),
    index("line end", {"b": "x\nerror: y"}, f"`{INDEX}` names `x\\nerror: y`: {BESIDE}"),
    index("half a pair", '{"weight_map":{"b":"\\ud800"}}', f"`{INDEX}` names `\\ud800`: {BESIDE}"),
    index("the folder itself", {"b": "."}, f"`{INDEX}` names `.`: {BESIDE}"),
    index("no name", {"b": ""}, f"`` is missing: `{INDEX}` says that it holds 1 tensors"),
    index("the config", {"b": CONFIG}, f"`{INDEX}` names `{CONFIG}`: expected a *.safetensors file"),
    index("itself", {"b": INDEX}, f"`{INDEX}` names `{INDEX}`: expected a *.safetensors file"),
    index("a name of 1 MB", {"b": "x" * 10**6}, f"`{'x' * 120}...` is missing: `{INDEX}` says"),
    index("a tensor that is elsewhere", {"b": "one.safetensors"},
          f"tensor `b` is not in `one.safetensors`, where `{INDEX}`"),
    index("a tensor with an escape", {"\x1b[2J": "one.safetensors"}, "tensor `\\x1b[2J` is not in `one.safetensors`"),
    Case("index: thousands of missing files",
         lambda folder: indexed(folder, {f"a{i}": f"{i}.safetensors" for i in range(200_000)}),
         f"`0.safetensors` is missing: `{INDEX}` says that it holds 1 tensors", "Refusal"),
    Case("index: thousands of missing tensors",
         lambda folder: indexed(folder, {f"a{i}": "one.safetensors" for i in range(200_000)}),
         f"tensor `a0` is not in `one.safetensors`, where `{INDEX}` puts it", "Refusal"),
    index("a million tensors", {f"a{i}": "one.safetensors" for i in range(10**6)}, f"`{INDEX}` holds too many values"),
    Case("index: a folder", named_folder, f"`three.safetensors` is missing: `{INDEX}` says that it holds 1 tensors"),
    Case("index: a link to a device", named_device, "`three.safetensors` is a link out of the source, to `/dev/zero`"),
    Case("index: a fifo", named_fifo, "`three.safetensors` is no regular file but a fifo"),
]  # fmt: skip

WORD = "expected a text of at most 200 characters as"
COUNT = "expected a whole number up to 1000000 as `num_hidden_layers`"
OBJECT = "expected an object as"

CONFIGS = [
    Case("config: 1 GB", huge(CONFIG), f"`{CONFIG}` is too large: expected at most 10000000 bytes, got 1000000000"),
    config("empty", "", f"`{CONFIG}` is not JSON: Expecting value"),
    config("a list", "[{}]", f"`{CONFIG}` is not a JSON object"),
    config("deep lists", '{"a":' + "[" * 10**6, f"`{CONFIG}` is not JSON: nested too deeply"),
    config("deep enough to parse", '{"a":' + "[" * 300 + "]" * 300 + "}",
           f"`{CONFIG}` is nested too deeply: expected at most 64"),
    config("millions of lists", '{"a":[' + "[]," * 3 * 10**6 + "[]]}", f"`{CONFIG}` holds too many values"),
    config("Latin-1", '{"a": "é"}'.encode("latin-1"), f"`{CONFIG}` is not UTF-8"),
    config("half a pair inside", '{"a": [["\\ud800"]]}', f"`{CONFIG}` holds text that is not UTF-8: `\\ud800`"),
    config("half a pair as key", '{"\\udc00": 1}', f"`{CONFIG}` holds text that is not UTF-8: `\\udc00`"),
    config("10,000 digits", '{"hidden_size": ' + "9" * 10_000 + "}",
           f"`{CONFIG}` is not JSON: a number of too many digits"),
    config("model_type a list", {"model_type": ["llama"]}, f"`{CONFIG}`: {WORD} `model_type`, got `a list of 1`"),
    config("model_type of 1 MB", {"model_type": "l" * 10**6}, f"`{CONFIG}`: {WORD} `model_type`"),
    config("model_type with an escape", {"model_type": "\x1b[31m"},
           f"`{CONFIG}`: {WORD} `model_type`, got `\\x1b[31m`"),
    config("model_type with a byte order mark", {"model_type": "llam\ufeffa"},  # found by the fuzz
           f"`{CONFIG}`: {WORD} `model_type`, got `llam\\ufeffa`"),
    config("layers a text", {"num_hidden_layers": "12"}, f"`{CONFIG}`: {COUNT}, got `12`", preset="first-last-8"),
    config("layers 1e999", '{"num_hidden_layers": 1e999}', f"`{CONFIG}`: {COUNT}, got `inf`", preset="first-last-8"),
    config("layers negative", {"num_hidden_layers": -1}, f"`{CONFIG}`: {COUNT}, got `-1`", preset="first-last-8"),
    config("layers true", {"num_hidden_layers": True}, f"`{CONFIG}`: {COUNT}, got `True`"),
    config("layers of 4,000 digits", '{"num_hidden_layers": ' + "9" * 4000 + "}",
           f"`{CONFIG}` holds a whole number of more than 1024 bits"),
    config("layers a list", {"text_config": {"num_hidden_layers": [1]}},
           f"text_config of `{CONFIG}`: {COUNT}, got `[1]`"),
    config("text_config a list", {"text_config": [{}]}, f"`{CONFIG}`: {OBJECT} `text_config`, got `a list of 1`"),
    config("quantization_config a text", {"quantization_config": "fp8"},
           f"`{CONFIG}`: {OBJECT} `quantization_config`, got `fp8`"),
    config("quantization_config a list", {"text_config": {"quantization_config": []}},
           f"text_config of `{CONFIG}`: {OBJECT} `quantization_config`, got `[]`"),
    config("quant_method an object", {"quantization_config": {"quant_method": {}}},
           f"quantization_config of `{CONFIG}`: {WORD} `quant_method`, got `{{}}`"),
    config("compression_config a number", {"compression_config": 4},
           f"`{CONFIG}`: {OBJECT} `compression_config`, got `4`"),
]  # fmt: skip


def special(name: str, make: Callable[[Path], object], says: str) -> Case:
    """A file of another kind in the place of `name`."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return Case(f"file: {says}", spoil, f"`{name}` {says}")


def listen(path: Path) -> None:
    """A socket, by a short relative path: theirs are limited to a hundred characters."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def linked(
    name: str,
    target: str,
    says: str,
    prepare: Callable[[Path], object] = lambda folder: None,
    kind: str = "CheckpointError",
) -> Case:
    def spoil(folder: Path) -> None:
        prepare(folder)
        link(folder, name, target)

    return Case(f"link: {name} to {target}", spoil, f"`{name}` {says}", kind)


def secret(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    (folder.parent / "source-of-others").mkdir()
    shard(folder.parent / "source-of-others" / SINGLE, GOOD, NBYTES)


def chained(folder: Path) -> None:
    """A link to a link inside that leads outside."""
    secret(folder)
    link(folder, "inner.txt", "../secret.txt")


def many_files(folder: Path) -> None:
    for i in range(10_001):
        (folder / f"{i}.txt").touch()


def many_folders(folder: Path) -> None:
    for i in range(10_001):
        (folder / str(i)).mkdir()


def deep_folders(folder: Path) -> None:
    path = folder
    for _ in range(600):
        path /= "d"
    path.mkdir(parents=True)


OUT = "is a link out of the source, to "
FILES = [
    special(CONFIG, os.mkfifo, "is no regular file but a fifo"),
    special(SINGLE, listen, "is no regular file but a socket"),
    linked("tokenizer.json", "/etc/passwd", f"{OUT}`/etc/passwd`"),
    linked("vocab.txt", "../secret.txt", OUT, secret),
    linked("notes.txt", "inner.txt", "are links out of the source, to ", chained),
    linked(SINGLE, "../source-of-others/model.safetensors", OUT, secret),
    linked(CONFIG, "/dev/zero", f"{OUT}`/dev/zero`"),
    linked(CONFIG, "/proc/self/environ", OUT),
    linked(INDEX, "/dev/stdin", OUT),
    linked("README.md", "/etc/hostname", f"{OUT}`/etc/hostname`"),
    linked("merges.txt", "nothing", "is a link that leads nowhere"),
    linked("loop.txt", "loop.txt", "is a link that leads nowhere"),
    linked("folder", ".", "is no regular file but a folder"),
    linked("everything", "/", f"{OUT}`/`"),
    Case("file: name with an escape", lambda folder: (folder / "\x1b[2J.txt").touch(),
         "`\\x1b[2J.txt` of `{source}` has control characters in its name"),
    Case("file: name with a line end", lambda folder: (folder / "a\nb.txt").touch(),
         "`a\\nb.txt` of `{source}` has control"),
    Case("file: name that is not UTF-8", lambda folder: open(os.fsencode(folder) + b"/\xff.txt", "w").close(),
         "`\\udcff.txt` of `{source}` has control characters in its name"),
    Case("file: name with a backslash", lambda folder: (folder / "x\\..\\y.txt").touch(),
         "`x\\..\\y.txt` of `{source}` is no path inside it"),
    Case("file: ten thousand side files", many_files,
         "source `{source}` has more than 10000 files: expected one model"),
    Case("file: ten thousand folders", many_folders, "source `{source}` has more than 10000 files: expected one model"),
    Case("file: folders in folders", deep_folders, "source `{source}` has folders too deep inside it: `d/d/d/"),
    Case("file: an empty shard", lambda folder: (folder / SINGLE).write_bytes(b""),
         f"`{SINGLE}` is empty: expected weights, got 0 bytes"),
    Case("file: a sparse terabyte", lambda folder: os.truncate(folder / SINGLE, 10**12),
         f"{H} does not cover the file: tensors end at byte"),
    Case("file: a zip (what torch.save writes)",
         lambda folder: (folder / SINGLE).write_bytes(b"PK\x03\x04" + b"\0" * 60),
         "`model.safetensors` is a zip archive"),
    Case("file: a length of zero bytes", lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", 0)),
         f"{H} is not JSON: Expecting value"),
]  # fmt: skip
