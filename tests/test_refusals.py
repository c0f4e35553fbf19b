"""Bad input: what is refused, with which words and exit code, and that the output folder stays as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert import (
    CheckpointError,
    OutputError,
    QuantConvertError,
    Refusal,
    UnsupportedError,
    UsageError,
)
from quantconvert.checkpoint.files import INDEX_NAME, SINGLE_NAME
from quantconvert.dtypes import DTYPES
from quantconvert.events import Event, ShardWritten, Started
from tests.builders import (
    LLAMA_CONFIG,
    decode_awq,
    decode_compressed_tensors,
    llama_tensors,
    read_tensors,
    weight,
    write_checkpoint,
)
from tests.raw_files import entry, write_raw
from tests.snapshots import snapshot

EXIT_CODES = {UsageError: 2, CheckpointError: 3, UnsupportedError: 4, OutputError: 5}
KNOWN_DTYPES = f"known dtypes: {', '.join(DTYPES)}"
DOWNLOAD = "download the missing file; every file named in the index must be there"
AGAIN = "download or copy this file again"
BESIDE = "choose a folder beside it"
ORIGINAL = "give the original checkpoint in bfloat16, float16 or float32"
OVERWRITE = "--overwrite replaces a checkpoint once the new one is complete; or choose another folder"
KEEP_QKV = r"keep all of them: --ignore 're:.*self_attn\.(q_proj|k_proj|v_proj)$'"
NAN_HINT = "--nan-policy keep leaves such tensors (and what is fused with them) unquantized"
DOWN_0 = "model.layers.0.mlp.down_proj"
Q_0, K_0, V_0 = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
Error = tuple[type[QuantConvertError], str, str | None]


def errors_of(error: QuantConvertError) -> list[Error]:
    """Class, message and hint of each error; a `Refusal` holds at least two."""
    parts = error.errors if isinstance(error, Refusal) else (error,)
    assert len(parts) > 1 or error is parts[0]
    assert [part.exit_code for part in parts] == [EXIT_CODES[type(part)] for part in parts]
    assert error.exit_code == parts[0].exit_code
    assert all(part.message in str(error) and (part.hint or "") in str(error) for part in parts)
    return [(type(part), part.message, part.hint) for part in parts]


def refusals(source: Path, out: Path, **options: Any) -> list[Error]:
    """The errors of a conversion that is refused, and that leaves `out` as it was."""
    before = snapshot(out)
    with pytest.raises(QuantConvertError) as info:
        quantconvert.convert(source, out, **options)
    assert snapshot(out) == before
    return errors_of(info.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Headers


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff{}", "header of `model.safetensors` is not UTF-8"),
        (b"{]", "header of `model.safetensors` is not JSON: Expecting property name enclosed in double quotes: "
                "line 1 column 2 (char 1)"),
        (b"", "header of `model.safetensors` is not JSON: Expecting value: line 1 column 1 (char 0)"),
        pytest.param(b"[" * 200_000, "header of `model.safetensors` is not JSON: nested too deeply", id="deep"),
        (b"[]", "header of `model.safetensors` is not a JSON object"),
        (b'{"a":{},"b":{},"a":{}}', "header of `model.safetensors` names `a` twice"),
        ({"a": 1}, "tensor `a` in `model.safetensors`: expected an object with dtype, shape and data_offsets"),
        ({"a": entry(0, 2, [-1])}, "tensor `a` in `model.safetensors`: shape is not a list of at most 32 sizes"),
        ({"a": entry(0, 2, [True])}, "tensor `a` in `model.safetensors`: shape is not a list of at most 32 sizes"),
        ({"a": entry(0, 2, [1.0])}, "tensor `a` in `model.safetensors`: shape is not a list of at most 32 sizes"),
        ({"a": entry(0, 2, [1] * 33)}, "tensor `a` in `model.safetensors`: shape is not a list of at most 32 sizes"),
        ({"a": entry(0, 2, [2**63])}, "tensor `a` in `model.safetensors`: shape is not a list of at most 32 sizes"),
        ({"a": entry(-2, 0, [1])}, "tensor `a` in `model.safetensors`: data_offsets is not a pair of offsets"),
        ({"a": entry(0, 2) | {"data_offsets": [0]}},
         "tensor `a` in `model.safetensors`: data_offsets is not a pair of offsets"),
        ({"a": entry(0, 14, [2, 4])},
         "tensor `a` in `model.safetensors`: BF16 of shape [2, 4] needs 16 bytes, its data_offsets [0, 14] span 14"),
        ({"a": entry(0, 16, [2**40, 2**40])},
         "tensor `a` in `model.safetensors`: BF16 of shape [1099511627776, 1099511627776] needs "
         "2417851639229258349412352 bytes, its data_offsets [0, 16] span 16"),
        ({"a": entry(16, 0, [2, 4])},
         "tensor `a` in `model.safetensors`: BF16 of shape [2, 4] needs 16 bytes, its data_offsets [16, 0] span -16"),
        ({"a": entry(2, 16)}, "header of `model.safetensors` lies about offsets: tensor `a` leaves a gap before it: "
                              "expected offset 0, got 2"),
        ({"a": entry(0, 6), "b": entry(8, 16)}, "header of `model.safetensors` lies about offsets: tensor `b` leaves "
                                                "a gap before it: expected offset 6, got 8"),
        ({"a": entry(0, 8), "b": entry(6, 16)}, "header of `model.safetensors` lies about offsets: tensor `b` overlaps "
                                                "the tensor before it: expected offset 8, got 6"),
    ],
)  # fmt: skip
def test_malformed_header(tmp_path: Path, out: Path, header: Any, message: str) -> None:
    folder = write_raw(tmp_path / "source", header, 16)
    assert refusals(folder, out) == [(CheckpointError, message, None)]


@pytest.mark.parametrize(("dtype", "shown"), [("BF17", "BF17"), ("bf16", "bf16"), (None, "None"), ([1], "[1]")])
def test_unknown_dtype(tmp_path: Path, out: Path, dtype: Any, shown: str) -> None:
    folder = write_raw(tmp_path / "source", {"a": entry(0, 2, dtype=dtype)}, 2)
    message = f"tensor `a` in `model.safetensors`: unknown dtype `{shown}`"
    assert refusals(folder, out) == [(CheckpointError, message, KNOWN_DTYPES)]


def test_header_covers_less_than_the_file(tmp_path: Path, out: Path) -> None:
    folder = write_raw(tmp_path / "source", {"a": entry(0, 16)}, 20)
    size = (folder / SINGLE_NAME).stat().st_size
    message = (
        f"header of `model.safetensors` does not cover the file: tensors end at byte {size - 4}, the file has {size}"
    )
    assert refusals(folder, out) == [(CheckpointError, message, None)]


def test_truncated_data(tmp_path: Path, out: Path) -> None:
    folder = write_raw(tmp_path / "source", {"a": entry(0, 8), "b": entry(8, 16)}, 15)
    size = (folder / SINGLE_NAME).stat().st_size
    message = f"`model.safetensors` is truncated: tensor `b` ends at byte {size + 1}, the file has {size}"
    assert refusals(folder, out) == [(CheckpointError, message, AGAIN)]


def test_truncated_header(tmp_path: Path, out: Path) -> None:
    folder = write_raw(tmp_path / "source", b"{}", length=100)
    message = "`model.safetensors` is truncated: its header needs 108 bytes, the file has 10"
    assert refusals(folder, out) == [(CheckpointError, message, None)]


def test_header_too_large(tmp_path: Path, out: Path) -> None:
    folder = write_raw(tmp_path / "source", b"{}", length=2**63)
    message = f"header of `model.safetensors` is too large: expected at most 25000000 bytes, got {2**63}"
    assert refusals(folder, out) == [(CheckpointError, message, None)]


AGAIN_SIGNED = "download this file again, signed in if the repository asks for it (`hf auth login`)"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4995264\n"
LFS = "`git lfs pull` in a git clone, or `hf download` of the repository, fetches the weights themselves"
NO_WEIGHTS: dict[str, tuple[bytes, str, str]] = {
    "git-lfs": (POINTER, "is a git-lfs pointer, not the weights", LFS),
    "html": (b"<!DOCTYPE html><html><head>", "is a web page, not the weights", AGAIN_SIGNED),
    "html after lines": (b"\n\n<html>", "is a web page, not the weights", AGAIN_SIGNED),
    "gguf": (b"GGUF\3\0\0\0\1\0\0\0", "is a GGUF file, llama.cpp's own format",
             "give the checkpoint that it was made from, in safetensors"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "is compressed by gzip", "unpack it with `gunzip`"),
    "empty": (b"", "is empty: expected weights, got 0 bytes", AGAIN_SIGNED),
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "what", "hint"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_other_files_under_a_weight_file_s_name(
    tmp_path: Path, out: Path, file: str, content: bytes, what: str, hint: str
) -> None:
    folder = write_raw(tmp_path / "source", b"{}")
    (folder / SINGLE_NAME).unlink()
    (folder / file).write_bytes(content)
    assert refusals(folder, out) == [(CheckpointError, f"`{file}` {what}", hint)]


def test_text_and_archives_are_no_safetensors(tmp_path: Path, out: Path) -> None:
    folder = write_raw(tmp_path / "source", b"{}")
    (folder / SINGLE_NAME).write_bytes(b"Access to model acme/tiny is restricted.\nPlease log in")
    message = "`model.safetensors` is text, not the weights: it begins with `Access to model acme/tiny is restricted.`"
    assert refusals(folder, out) == [(CheckpointError, message, AGAIN_SIGNED)]
    (folder / SINGLE_NAME).write_bytes(b"PK\3\4" + bytes(20))
    ((_, message, _),) = refusals(folder, out)
    assert message == "`model.safetensors` is a zip archive"


@pytest.mark.parametrize("size", [1, 7])
def test_no_header(tmp_path: Path, out: Path, size: int) -> None:
    folder = write_raw(tmp_path / "source", b"{}")
    (folder / SINGLE_NAME).write_bytes(b"\0" * size)
    message = f"`model.safetensors` is no safetensors file: expected at least 8 bytes, got {size}"
    assert refusals(folder, out) == [(CheckpointError, message, None)]


# Shards and index


def test_missing_shard(tmp_path: Path, out: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = f"`model-00002-of-00003.safetensors` is missing: `{INDEX_NAME}` says that it holds 7 tensors"
    assert refusals(folder, out) == [(CheckpointError, message, DOWNLOAD)]


def test_all_missing_and_broken_shards_at_once(tmp_path: Path, out: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=3)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")
    (folder / "config.json").unlink()
    assert refusals(folder, out) == [
        (CheckpointError, f"no config.json in `{folder}`", None),
        *((CheckpointError, f"`model-0000{i}-of-00003.safetensors` is missing: `{INDEX_NAME}` says that it holds 7 "
                            "tensors", DOWNLOAD) for i in (1, 2)),
        (CheckpointError, "`model-00003-of-00003.safetensors` is empty: expected weights, got 0 bytes", AGAIN_SIGNED),
    ]  # fmt: skip


def test_truncated_shard(tmp_path: Path, out: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    message = f"`{shard.name}` is truncated: tensor `model.norm.weight` ends at byte {size}, the file has {size - 1}"
    assert refusals(folder, out) == [(CheckpointError, message, AGAIN)]


def test_tensor_not_where_the_index_puts_it(tmp_path: Path, out: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=2)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    message = f"tensor `lm_head.weight` is not in `model-00001-of-00002.safetensors`, where `{INDEX_NAME}` puts it"
    assert refusals(folder, out) == [(CheckpointError, message, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"`{INDEX_NAME}` is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
              "(char 1)"),
        ("[]", f"`{INDEX_NAME}` is not a JSON object"),
        ("{}", f"`{INDEX_NAME}` has no weight_map from tensor names to file names"),
        ('{"weight_map":{"a":1}}', f"`{INDEX_NAME}` has no weight_map from tensor names to file names"),
        ('{"weight_map":{"a":"../a.safetensors"}}', f"`{INDEX_NAME}` names `../a.safetensors`: expected a file "
                                                    "beside it"),
        ('{"weight_map":{"a":"x","a":"y"}}', f"`{INDEX_NAME}` names `a` twice"),
    ],
)  # fmt: skip
def test_malformed_index(tmp_path: Path, out: Path, text: str, message: str) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=2)
    (folder / INDEX_NAME).write_text(text)
    assert refusals(folder, out) == [(CheckpointError, message, None)]


def test_tensor_in_two_shards_without_index(tmp_path: Path, out: Path) -> None:
    folder = write_raw(tmp_path / "source", {"a": entry(0, 2), "b": entry(2, 4)}, 4)
    shutil.copy(folder / SINGLE_NAME, folder / "one.safetensors")
    write_raw(folder, {"b": entry(0, 2)}, 2)
    (folder / SINGLE_NAME).rename(folder / "two.safetensors")
    message = "tensor `b` exists twice: in `one.safetensors` and in `two.safetensors`"
    assert refusals(folder, out) == [(CheckpointError, message, None)]


# Config and source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'a': 1}", "`config.json` is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
                      "(char 1)"),
        (b"[]", "`config.json` is not a JSON object"),
        (b"\xff\xfe{}", "`config.json` is not UTF-8"),
        pytest.param(b"[" * 200_000, "`config.json` is not JSON: nested too deeply", id="deep"),
        (b'{"a": 1, "a": 2}', "`config.json` names `a` twice"),
        pytest.param(b" " * 10_000_001, "`config.json` is too large: expected at most 10000000 bytes, got 10000001",
                     id="large"),
    ],
)  # fmt: skip
def test_malformed_config(source: Path, out: Path, content: bytes, message: str) -> None:
    (source / "config.json").write_bytes(content)
    assert refusals(source, out) == [(CheckpointError, message, None)]


def test_no_config(source: Path, out: Path) -> None:
    (source / "config.json").unlink()
    assert refusals(source, out) == [(CheckpointError, f"no config.json in `{source}`", None)]


def test_no_config_but_one_in_a_sub_folder(source: Path, out: Path) -> None:
    (source / "transformer").mkdir()
    (source / "config.json").rename(source / "transformer" / "config.json")
    hint = f"one sub-folder has its own: try `{source}/transformer`"
    assert refusals(source, out) == [(CheckpointError, f"no config.json in `{source}`", hint)]


def test_empty_folder(tmp_path: Path, out: Path) -> None:
    (tmp_path / "source").mkdir()
    assert refusals(tmp_path / "source", out) == [
        (CheckpointError, f"source `{tmp_path}/source` is an empty folder", None)
    ]


def test_source_does_not_exist(tmp_path: Path, out: Path) -> None:
    assert refusals(tmp_path / "source", out) == [(CheckpointError, f"source `{tmp_path}/source` does not exist", None)]


def test_source_is_a_file(source: Path, out: Path) -> None:
    path = source / SINGLE_NAME
    message = f"source `{path}` is a file: expected a folder with config.json and *.safetensors"
    assert refusals(path, out) == [(CheckpointError, message, None)]


@pytest.mark.parametrize(("names", "found"), [((), ""), (("b.pt", "a.bin"), "; found a.bin, b.pt")])
def test_no_safetensors(source: Path, out: Path, names: tuple[str, ...], found: str) -> None:
    (source / SINGLE_NAME).unlink()
    for name in names:
        (source / name).touch()
    assert refusals(source, out) == [(CheckpointError, f"no *.safetensors in `{source}`{found}", None)]


def test_revision_of_a_folder(source: Path, out: Path) -> None:
    message = f"--revision main is for Hub repositories, `{source}` is a local path"
    assert refusals(source, out, revision="main") == [(CheckpointError, message, None)]


@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME])
def test_unreadable_file(source: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if path == source / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)
    assert refusals(source, out) == [(CheckpointError, f"cannot read `{name}` of `{source}`: Permission denied", None)]


def zero_rows(folder: Path) -> None:
    write_raw(folder, {f"{DOWN_0}.weight": entry(0, 0, [0, 128]), f"{Q_0}.weight": entry(0, 32768, [128, 128])}, 32768)


def zero_columns(folder: Path) -> None:
    write_raw(folder, {f"{DOWN_0}.weight": entry(0, 0, [128, 0]), f"{Q_0}.weight": entry(0, 32768, [128, 128])}, 32768)


def name_without_utf8(folder: Path) -> None:
    write_raw(folder, {f"{DOWN_0}.weight": entry(0, 32768, [128, 128]), "\ud800": entry(32768, 32770)}, 32770)


def name_of_a_result(folder: Path) -> None:
    write_raw(folder, {f"{DOWN_0}.weight": entry(0, 32768, [128, 128]), f"{DOWN_0}.qzeros": entry(32768, 32770)}, 32770)


def config_without_utf8(folder: Path) -> None:
    write_checkpoint(folder, config=LLAMA_CONFIG | {"x": "\ud800"})


def config_of_wrong_types(folder: Path) -> None:
    write_checkpoint(folder, config=LLAMA_CONFIG | {"num_hidden_layers": "two", "num_nextn_predict_layers": 1})


@pytest.mark.parametrize("nan_policy", ["error", "keep"])
@pytest.mark.parametrize(
    "build",
    [zero_rows, zero_columns, name_without_utf8, name_of_a_result, config_without_utf8, config_of_wrong_types],
)
def test_strange_but_well_formed_never_crashes(
    tmp_path: Path, out: Path, build: Callable[[Path], None], nan_policy: Any
) -> None:
    """Converted or refused with a message, never a traceback."""
    build(tmp_path / "source")
    try:
        quantconvert.convert(tmp_path / "source", out, nan_policy=nan_policy)
    except QuantConvertError:
        assert not out.exists()


# Output


def test_output_not_empty(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "b.txt").touch()
    message = f"output `{out}` exists and is not empty: it holds b.txt"
    assert refusals(source, out) == [(OutputError, message, OVERWRITE)]
    for name in "acd":
        (out / name).touch()
    message = f"output `{out}` exists and is not empty: it holds a, b.txt, c ..."
    assert refusals(source, out) == [(OutputError, message, OVERWRITE)]


def test_output_is_no_checkpoint(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()
    message = f"output `{out}` is not empty and no checkpoint: --overwrite replaces only those"
    assert refusals(source, out, overwrite=True) == [(OutputError, message, None)]


def test_output_is_a_file(source: Path, out: Path) -> None:
    out.write_text("a file")
    message = f"output `{out}` exists and is not a folder"
    assert refusals(source, out, overwrite=True) == [(OutputError, message, None)]
    assert out.read_text() == "a file"


def test_output_below_a_file(source: Path, out: Path) -> None:
    out.touch()
    with pytest.raises(OutputError, match=re.escape(str(out))):
        quantconvert.plan(source, out / "inside")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("below", "what"),
    [("inside", "is inside the source `{source}`"), (".", "is the source itself"),
     ("..", "contains the source `{source}`")],
)  # fmt: skip
def test_output_and_source_overlap(tmp_path: Path, below: str, what: str, overwrite: bool) -> None:
    source = write_checkpoint(tmp_path / "parent" / "source")
    out = Path(os.path.normpath(source / below))
    before = snapshot(tmp_path)
    message = f"output `{out}` {what.format(source=source)}"
    assert refusals(source, out, overwrite=overwrite) == [(OutputError, message, BESIDE)]
    assert snapshot(tmp_path) == before


def test_output_is_the_source_through_a_link(tmp_path: Path, source: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    message = f"output `{link}` is the source itself"
    assert refusals(source, link, overwrite=True) == [(OutputError, message, BESIDE)]


def test_output_not_writable(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantconvert.run.folder.preflight.os.access", lambda path, mode: False)
    message = f"cannot write in `{out.parent}`: permission denied"
    assert refusals(source, out) == [(OutputError, message, None)]


def set_free_nbytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("quantconvert.run.folder.preflight.shutil.disk_usage", lambda path: usage(10**12, 0, free))


def test_disk_too_small(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = quantconvert.plan(source).output_nbytes
    set_free_nbytes(monkeypatch, needed)
    with pytest.raises(OutputError) as planned:
        quantconvert.plan(source, out)
    events: list[Event] = []
    found = refusals(source, out, report=events.append)
    assert found == errors_of(planned.value)
    assert not events
    ((kind, message, hint),) = found
    match = re.fullmatch(rf"disk of `{out}` is too small: the result needs (\d+) bytes, {needed} are free", message)
    assert kind is OutputError
    assert match
    assert needed < int(match[1]) < needed + 2_000_000
    assert hint == "free some space, or choose a folder on another disk"


def test_disk_large_enough(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_nbytes(monkeypatch, quantconvert.plan(source).output_nbytes + 2_000_000)
    quantconvert.convert(source, out)
    written = sum(path.stat().st_size for path in out.rglob("*"))
    assert written <= quantconvert.plan(source).output_nbytes + 1_000_000


# Group sizes that do not divide: width 576 as in SmolLM2, 576 = 4.5 * 128, 1536 = 12 * 128


WIDE_NAMES = ("mlp.gate", "mlp.up", "self_attn.k", "self_attn.o", "self_attn.q", "self_attn.v")
WIDE_LINEAR = [f"model.layers.{i}.{name}_proj" for i in range(2) for name in WIDE_NAMES]
NARROW_LINEAR = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors(hidden=576, intermediate=1536, kv=192)
    return write_checkpoint(tmp_path_factory.mktemp("smol"), tensors)


def matched(patterns: list[str], names: list[str]) -> set[str]:
    """Names that compressed-tensors takes as matched (`utils/match.py`): `re:` from the start, else equality."""
    return {name for name in names for p in patterns if (re.match(p[3:], name) if p.startswith("re:") else p == name)}


def test_indivisible_names_every_kind_of_tensor(smol: Path, out: Path) -> None:
    kinds = [name.replace("layers.0", "layers.N") for name in WIDE_LINEAR if "layers.0" in name]
    lines = [f"\n  `{name}.weight`: in_features 576 (2 of them, N any number)" for name in kinds]
    message = f"--group-size 128 does not divide in_features of 12 weights:{''.join(lines)}"
    hint = (
        "--group-size 64 divides every layer; or --on-indivisible skip (keep them in high precision) "
        "or channel (one scale a row)"
    )
    assert refusals(smol, out) == [(UnsupportedError, message, hint)]
    assert len(quantconvert.plan(smol, out, group_size=64).quantized) == 14


def test_indivisible_by_everything(tmp_path: Path, out: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {f"{DOWN_0}.weight": weight(8, 100)})
    message = f"--group-size 128 does not divide in_features of 1 weights:\n  `{DOWN_0}.weight`: in_features 100"
    hint = "--on-indivisible skip (keep them in high precision) or channel (one scale a row)"
    assert refusals(source, out, allow_incomplete=True) == [(UnsupportedError, message, hint)]


def test_skip_indivisible(smol: Path, out: Path) -> None:
    result = quantconvert.convert(smol, out, on_indivisible="skip", format="compressed-tensors")
    before, after = read_tensors(smol), read_tensors(out)
    for name in WIDE_LINEAR:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    packed = {name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")}
    assert packed == set(NARROW_LINEAR)
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = block["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 128)
    everything = [*WIDE_LINEAR, *NARROW_LINEAR, "lm_head"]
    fused = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    assert matched(block["ignore"], everything) == {*WIDE_LINEAR, "lm_head"}
    assert matched(block["ignore"], fused) == set(fused)
    assert "12 weights are kept because the group size does not divide them (--on-indivisible skip)" in (
        result.plan.notes
    )


def test_skip_indivisible_as_awq(smol: Path, out: Path) -> None:
    result = quantconvert.convert(smol, out, on_indivisible="skip")
    assert result.plan.format == "awq"
    after = read_tensors(out)
    assert {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")} == set(NARROW_LINEAR)
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    fused = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    assert block["modules_to_not_convert"] == sorted([*WIDE_LINEAR, *fused, "lm_head"])
    assert decode_awq(after, NARROW_LINEAR[0]).shape == (576, 1536)


def test_channel_where_indivisible(smol: Path, out: Path) -> None:
    result = quantconvert.convert(smol, out, on_indivisible="channel")
    assert result.plan.format == "compressed-tensors"
    before, after = read_tensors(smol), read_tensors(out)
    for name, groups, tolerance in ((WIDE_LINEAR[0], 1, 0.02), (NARROW_LINEAR[0], 12, 0.01)):
        assert after[f"{name}.weight_scale"].shape[1] == groups
        wanted = before[f"{name}.weight"].float()
        assert (decode_compressed_tensors(after, name, 4).float() - wanted).abs().max() < tolerance
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    everything = [*WIDE_LINEAR, *NARROW_LINEAR, "lm_head"]
    assert matched(block["ignore"], everything) == {"lm_head"}
    found = {
        (group["weights"]["strategy"], group["weights"]["group_size"]): matched(group["targets"], everything)
        for group in block["config_groups"].values()
    }
    assert found == {("group", 128): set(NARROW_LINEAR), ("channel", None): set(WIDE_LINEAR)}


def test_channel_where_indivisible_is_no_awq(smol: Path, out: Path) -> None:
    message = "awq holds one scheme for the whole model: int4 g128 asymmetric, int4 per channel asymmetric"
    assert refusals(smol, out, on_indivisible="channel", format="awq") == [
        (UnsupportedError, message, "--format compressed-tensors")
    ]


# Sources that are quantized, or hold nothing to quantize


@pytest.mark.parametrize(
    ("extra", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
)
def test_quantized_by_config_alone(tmp_path: Path, out: Path, extra: dict[str, Any], method: str) -> None:
    source = write_checkpoint(tmp_path / "source", config=LLAMA_CONFIG | extra)
    message = f"config.json of `{source}` says that it is quantized by `{method}`, but no tensor is"
    hint = "remove its quantization_config if the weights are plain"
    assert refusals(source, out) == [(CheckpointError, message, hint)]


@pytest.mark.parametrize(
    ("block", "method"), [({"bits": 4}, "unknown method"), ({"quant_method": "bitsandbytes"}, "bitsandbytes")]
)
def test_quantized_by_an_unknown_method(tmp_path: Path, out: Path, block: dict[str, Any], method: str) -> None:
    source = write_checkpoint(tmp_path / "source", config=LLAMA_CONFIG | {"quantization_config": block})
    message = f"source `{source}` is already quantized, by a method that is not read: `{method}`"
    ((kind, found, hint),) = refusals(source, out)
    assert (kind, found) == (UnsupportedError, message)
    assert hint is not None
    assert hint.startswith("methods that are decoded: fp8, ")


@pytest.mark.parametrize(
    ("suffix", "format"), [("qweight", "awq"), ("weight_shape", "compressed-tensors")], ids=["awq", "compressed"]
)
def test_quantized_by_tensor_names(source: Path, tmp_path: Path, out: Path, suffix: str, format: str) -> None:
    quantized = tmp_path / "quantized"
    quantconvert.convert(source, quantized, format=format)
    (quantized / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    kind, message, _ = refusals(quantized, out)[0]
    assert kind is CheckpointError
    assert message.startswith("42 tensors belong to a quantization of which the other tensors are missing, or that is")
    assert f".{suffix}`" in message


def test_own_result_as_source(source: Path, tmp_path: Path, out: Path) -> None:
    quantconvert.convert(source, tmp_path / "quantized")
    kind, message, hint = refusals(tmp_path / "quantized", out)[0]
    assert kind is UnsupportedError
    assert message.startswith(
        "the source is already quantized (`awq`, 4 bits): 14 weights would be quantized again to as many bits or fewer"
    )
    assert hint == "--requantize does that (both errors add up); better, give the original checkpoint"


def test_nothing_to_quantize(tmp_path: Path, out: Path) -> None:
    tensors = {"model.embed_tokens.weight": weight(8, 128), "model.norm.weight": weight(128)}
    source = write_checkpoint(tmp_path / "source", tensors)
    message = f"`{source}` has no weight to quantize: all 2 tensors are kept (embedding, norm)"
    hint = "`quantconvert plan` lists the reason for each tensor"
    assert refusals(source, out) == [(UnsupportedError, message, hint)]


def test_no_tensor_at_all(tmp_path: Path, out: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {})
    assert refusals(source, out) == [
        (UnsupportedError, f"`{source}` holds no tensor", "the weights may not have been downloaded yet")
    ]


def test_everything_ignored(source: Path, out: Path) -> None:
    message = f"`{source}` has no weight to quantize: all 21 tensors are kept (embedding, ignored, lm_head, norm)"
    hint = "`quantconvert plan` lists the reason for each tensor"
    assert refusals(source, out, ignore=["*"]) == [(UnsupportedError, message, hint)]


# --ignore


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        (f"{DOWN_0[:-4]}prj", [DOWN_0, "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]),
        ("*.dwn_proj", [DOWN_0]),
        ("lm_haed", ["lm_head"]),
        ("re:lm_head$.", ["lm_head"]),
    ],
)
def test_ignore_matches_nothing(source: Path, out: Path, pattern: str, close: list[str]) -> None:
    ((kind, message, hint),) = refusals(source, out, ignore=[pattern])
    assert (kind, message) == (UsageError, f"--ignore `{pattern}` matches no tensor")
    assert hint is not None
    assert hint.startswith(f"names like it: `{close[0]}`")
    assert set(re.findall("`(.+?)`", hint)) >= set(close)


def test_ignore_does_not_parse(source: Path, out: Path) -> None:
    message = "pattern `re:(` is not a regular expression: missing ), unterminated subpattern at position 0"
    assert refusals(source, out, ignore=["re:("]) == [(UsageError, message, None)]


def test_ignore_splits_a_fused_set(source: Path, out: Path) -> None:
    message = (
        "`model.layers.0.self_attn`: engines load q_proj, k_proj, v_proj as one qkv_proj, "
        "so that they need one scheme, got q_proj: kept (ignored), k_proj: int4 g128, v_proj: int4 g128"
    )
    assert refusals(source, out, ignore=[Q_0]) == [(UnsupportedError, message, KEEP_QKV)]
    widened = KEEP_QKV.partition("'")[2].rstrip("'")
    plan = quantconvert.plan(source, out, ignore=[Q_0, widened])
    kept = {task.source.name for task in plan.kept if task.reason == "ignored"}
    assert kept == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkv"}


def test_ignore_splits_several_fused_sets(source: Path, out: Path) -> None:
    found = refusals(source, out, ignore=["*.layers.1.self_attn.[kv]_proj", "*.layers.0.mlp.up_proj"])
    assert found == [
        (UnsupportedError, "`model.layers.1.self_attn`: engines load q_proj, k_proj, v_proj as one qkv_proj, so "
                           "that they need one scheme, got q_proj: int4 g128, k_proj: kept (ignored), "
                           "v_proj: kept (ignored)", KEEP_QKV),
        (UnsupportedError, "`model.layers.0.mlp`: engines load gate_proj, up_proj as one gate_up_proj, so that "
                           "they need one scheme, got gate_proj: int4 g128, up_proj: kept (ignored)",
         "keep all of them: --ignore 're:.*mlp\\.(gate_proj|up_proj)$'"),
    ]  # fmt: skip


# NaN and Inf


def spoiled(folder: Path, name: str = K_0) -> Path:
    """A small Llama of which one weight holds a NaN at [3, 5], another at [9, 1], and an Inf at [7, 0]."""
    tensors = llama_tensors()
    broken = tensors[f"{name}.weight"]
    broken[3, 5] = broken[9, 1] = float("nan")
    broken[7, 0] = float("-inf")
    return write_checkpoint(folder, tensors)


@pytest.mark.parametrize(
    "options",
    [{}, {"format": "compressed-tensors"}, {"scheme": "W8A16:channel"},
     {"format": "compressed-tensors", "scheme": "W4A16:tensor"}],
)  # fmt: skip
def test_nonfinite_weight(tmp_path: Path, out: Path, options: dict[str, Any]) -> None:
    source = spoiled(tmp_path / "source")
    message = (
        f"tensor `{K_0}.weight` in `model.safetensors` holds 2 NaN, 1 Inf, first at [3, 5]: expected finite weights"
    )
    assert refusals(source, out, **options) == [(CheckpointError, message, NAN_HINT)]


@pytest.mark.parametrize(("value", "text"), [("nan", "1 NaN"), ("inf", "1 Inf"), ("-inf", "1 Inf")])
def test_one_nonfinite_value_at_the_end(tmp_path: Path, out: Path, value: str, text: str) -> None:
    tensors = llama_tensors(dtype=torch.float32)
    tensors[f"{DOWN_0}.weight"][127, 255] = float(value)
    source = write_checkpoint(tmp_path / "source", tensors)
    message = (
        f"tensor `{DOWN_0}.weight` in `model.safetensors` holds {text}, first at [127, 255]: expected finite weights"
    )
    assert refusals(source, out) == [(CheckpointError, message, NAN_HINT)]


def test_nonfinite_is_copied_where_nothing_is_quantized(tmp_path: Path, out: Path) -> None:
    source = spoiled(tmp_path / "source", "model.embed_tokens")
    quantconvert.convert(source, out)
    assert (out / SINGLE_NAME).exists()


def test_keep_nonfinite(tmp_path: Path, out: Path) -> None:
    source = spoiled(tmp_path / "source")
    result = quantconvert.convert(source, out, nan_policy="keep", format="compressed-tensors")
    before, after = read_tensors(source), read_tensors(out)
    for name in (Q_0, K_0, V_0):
        assert torch.equal(after[f"{name}.weight"].view(torch.int16), before[f"{name}.weight"].view(torch.int16))
    packed = {name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")}
    linear = {name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")}
    assert packed == linear - {Q_0, K_0, V_0}
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert matched(ignore, [*linear, "lm_head"]) == {Q_0, K_0, V_0, "lm_head"}
    evidence = {task.source.name: task.evidence for task in result.plan.kept if task.reason == "non-finite"}
    assert evidence == {
        f"{Q_0}.weight": "fused with a non-finite weight as qkv_proj",
        f"{K_0}.weight": "2 NaN, 1 Inf, first at [3, 5]",
        f"{V_0}.weight": "fused with a non-finite weight as qkv_proj",
    }


# What a layout cannot hold


def narrow(folder: Path) -> Path:
    """A Llama whose k_proj and v_proj have 60 output features."""
    return write_checkpoint(folder, llama_tensors(kv=60))


def test_awq_with_8_bits(source: Path, out: Path) -> None:
    message = (
        f"awq holds 4 bits only, got 8: `{DOWN_0}`, `model.layers.0.mlp.gate_proj`, `model.layers.0.mlp.up_proj` "
        "and 11 more"
    )
    assert refusals(source, out, format="awq", bits=8) == [(UnsupportedError, message, "--format compressed-tensors")]


def test_awq_per_tensor(source: Path, out: Path) -> None:
    message = (
        f"awq has no per-tensor scales: `{DOWN_0}`, `model.layers.0.mlp.gate_proj`, `model.layers.0.mlp.up_proj` "
        "and 11 more"
    )
    assert refusals(source, out, format="awq", group_size=0) == [
        (UnsupportedError, message, "--format compressed-tensors")
    ]


def test_awq_out_features(tmp_path: Path, out: Path) -> None:
    source = narrow(tmp_path / "source")
    message = (
        f"awq packs 8 output features in a word: expected out_features % 8 == 0, got 60: `{K_0}`, `{V_0}`, "
        "`model.layers.1.self_attn.k_proj` and 1 more"
    )
    assert refusals(source, out, format="awq") == [(UnsupportedError, message, "--format compressed-tensors")]
    assert quantconvert.plan(source).format == "compressed-tensors"


def test_per_tensor_without_a_format(source: Path, out: Path) -> None:
    message = "per-tensor weight-only scales load in no serving engine"
    hint = "--group-size -1 (per channel), or name the format: --format compressed-tensors"
    assert refusals(source, out, group_size=0) == [(UnsupportedError, message, hint)]
    scheme = quantconvert.plan(source, group_size=0, format="compressed-tensors").scheme
    assert scheme
    assert scheme.strategy == "tensor"


def test_scale_too_large_for_float16(tmp_path: Path, out: Path) -> None:
    tensors = llama_tensors()
    tensors[f"{DOWN_0}.weight"][0, 0] = 1e30
    source = write_checkpoint(tmp_path / "source", tensors)
    message = (
        f"tensor `{DOWN_0}.weight` in `model.safetensors` has a scale above 65504, the largest of float16, "
        "which awq stores"
    )
    hint = "--format compressed-tensors stores scales in the weight's own dtype, or --ignore this tensor"
    assert refusals(source, out) == [(UnsupportedError, message, hint)]
    quantconvert.convert(source, out, format="compressed-tensors")


def test_memory_limit_too_small(source: Path, out: Path) -> None:
    ((kind, message, hint),) = refusals(source, out, memory_limit=1000)
    pattern = (
        rf"tensor `{re.escape(DOWN_0)}\.weight` in `model\.safetensors` needs (\d+) bytes at its peak: "
        r"expected at most --memory-limit 1000"
    )
    match = re.fullmatch(pattern, message)
    assert kind is UnsupportedError
    assert match
    assert hint == f"--memory-limit {-(-int(match[1]) // 10**6)}MB"


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_memory_limit_hint_is_enough(tmp_path: Path, format: str, workers: int) -> None:
    nbytes = 2 * 4096 * 4096
    source = write_raw(tmp_path / "source", {f"{DOWN_0}.weight": entry(0, nbytes, [4096, 4096])}, nbytes)
    with pytest.raises(UnsupportedError) as info:
        quantconvert.plan(source, format=format, workers=workers, memory_limit="1MB", allow_incomplete=True)
    assert info.value.hint is not None
    options: dict[str, Any] = {"format": format, "workers": workers, "allow_incomplete": True}
    limit = info.value.hint.rpartition(" ")[2]
    assert quantconvert.plan(source, memory_limit=limit, **options).peak_nbytes > 0


# Everything at once


def test_all_refusals_together(tmp_path: Path, out: Path) -> None:
    source = narrow(tmp_path / "source")
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    found = refusals(source, out, format="awq", bits=8, group_size=256, ignore=["vision", "*.q_proj"])
    kinds = [kind for kind, _, _ in found]
    assert kinds == [UsageError, *[UnsupportedError] * 4, OutputError]
    beginnings = [
        "--ignore `vision` matches no tensor",
        "--group-size 256 does not divide in_features of 10 weights:\n  `model.layers.N.mlp.gate_proj.weight`",
        "`model.layers.0.self_attn`: engines load q_proj, k_proj, v_proj as one qkv_proj, so that they need one scheme",
        "awq holds 4 bits only, got 8: ",
        "awq packs 8 output features in a word: expected out_features % 8 == 0, got 60: ",
        f"output `{out}` exists and is not empty: it holds notes.txt",
    ]
    for (_, message, _), beginning in zip(found, beginnings, strict=True):
        assert message.startswith(beginning)


def test_refusal_has_the_exit_code_of_its_first_error(source: Path, out: Path) -> None:
    with pytest.raises(Refusal) as info:
        quantconvert.plan(source, out, bits=8, format="awq", ignore=["nothing"])
    assert info.value.exit_code == 2
    assert [type(error) for error in info.value.errors] == [UsageError, UnsupportedError]


# Options


FORMAT_HINT = "known formats: auto, awq, compressed-tensors, gptq, rtn, fp8, mlx"
PRESET_HINT = (
    "known schemes: W4A16, W4A16_ASYM, W8A16, W8A16_ASYM, W8A8, W8A8_STATIC, W4A8, W4AFP8, FP8_DYNAMIC, FP8_BLOCK, "
    "FP8A16, NVFP4A16, MXFP4A16, MXFP8A16, MXFP8; "
    "`:g64`, `:channel`, `:tensor` or `:block` may follow"
)
SIZES = "expected a size such as `5GB` or `512MiB`, got"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"format": "gguf"}, "--format: unknown format `gguf`", FORMAT_HINT),
        ({"scheme": "W3A16"}, "--scheme: unknown scheme `W3A16`", PRESET_HINT),
        ({"scheme": "W4A16:g"}, "--scheme: unknown scheme `W4A16:g`", f"did you mean `W4A16`? {PRESET_HINT}"),
        ({"scheme": "w4a16"}, "--scheme: unknown scheme `w4a16`", f"did you mean `W4A16`? {PRESET_HINT}"),
        ({"scheme": "W4A16:64"}, "--scheme: unknown scheme `W4A16:64`", f"did you mean `W4A16:g64`? {PRESET_HINT}"),
        ({"scheme": "W4A16", "bits": 8}, "--scheme W4A16 contradicts --bits or --symmetric/--asymmetric",
         "give one of them"),
        ({"scheme": "W4A16_ASYM", "symmetric": True},
         "--scheme W4A16_ASYM contradicts --bits or --symmetric/--asymmetric", "give one of them"),
        ({"scheme": "W4A16:g64", "group_size": 32}, "--scheme W4A16:g64 contradicts --group-size 32",
         "give one of them"),
        ({"bits": 3}, "--bits: expected 4 or 8, got 3", None),
        ({"bits": 0}, "--bits: expected 4 or 8, got 0", None),
        *(({"group_size": size}, "--group-size: expected a multiple of 8, -1 (per channel) or 0 (per tensor), "
           f"got {size}", "engines read 32, 64 and 128") for size in (-2, 4, 100)),
        ({"max_shard_size": "5XB"}, f"--max-shard-size: {SIZES} `5XB`", None),
        ({"max_shard_size": "GB"}, f"--max-shard-size: {SIZES} `GB`", None),
        ({"max_shard_size": "-1GB"}, f"--max-shard-size: {SIZES} `-1GB`", None),
        ({"max_shard_size": "0"}, f"--max-shard-size: {SIZES} `0`", None),
        ({"max_shard_size": 0}, f"--max-shard-size: {SIZES} `0`", None),
        ({"memory_limit": "much"}, f"--memory-limit: {SIZES} `much`", None),
        ({"memory_limit": "0.1"}, f"--memory-limit: {SIZES} `0.1`", None),
        ({"memory_limit": 0}, f"--memory-limit: {SIZES} `0`", None),
        ({"workers": -1}, "--workers: expected a whole number of at least 0, got -1", None),
        ({"on_indivisible": "pad"}, "--on-indivisible: expected error, skip, channel, got `pad`", None),
        ({"nan_policy": "zero"}, "--nan-policy: expected error, keep, got `zero`", None),
        ({"colour": "red"}, "unknown option `colour`", None),
        ({"group_sise": 64}, "unknown option `group_sise`", "did you mean `group_size`?"),
        ({"on_indivisible": "skp"}, "--on-indivisible: expected error, skip, channel, got `skp`",
         "did you mean `skip`?"),
        ({"strict": "yes"}, "--strict: expected true or false, got 'yes'", None),
        ({"ignore": [3]}, "--ignore: expected text, got 3", None),
    ],
)  # fmt: skip
def test_bad_options(source: Path, out: Path, options: dict[str, Any], message: str, hint: str | None) -> None:
    assert refusals(source, out, **options) == [(UsageError, message, hint)]


# What is left behind


def refused_by_plan(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"group_size": 96}


def nan_in_the_last_layer(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    spoiled(source, "model.layers.1.self_attn.v_proj")
    return {"workers": 1}


def source_becomes_shorter(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = source / SINGLE_NAME
    nbytes = path.stat().st_size // 2
    return {"report": lambda event: os.truncate(path, nbytes) if isinstance(event, Started) else None}


def side_file_disappears(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (source / "tokenizer.json").write_text("{}")
    vanish = (source / "tokenizer.json").unlink
    return {"report": lambda event: vanish() if isinstance(event, Started) else None}


def disk_fills_up(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def refuse(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    return {}


def file_cannot_be_created(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    create = os.open

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(".partial"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return create(path, *args, **options)

    monkeypatch.setattr("os.open", refuse)
    return {}


FAILURES = [
    (refused_by_plan, UnsupportedError), (nan_in_the_last_layer, CheckpointError),
    (source_becomes_shorter, CheckpointError),
    (disk_fills_up, OutputError), (file_cannot_be_created, OutputError),
]  # fmt: skip


@pytest.mark.parametrize(("arrange", "kind"), FAILURES)
def test_failure_leaves_no_folders(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrange: Any, kind: type[Exception]
) -> None:
    options = arrange(source, monkeypatch)
    with pytest.raises(kind):
        quantconvert.convert(source, tmp_path / "new" / "deeper" / "out", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("arrange", "kind"), FAILURES)
def test_failure_leaves_an_empty_folder_empty(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, arrange: Any, kind: type[Exception]
) -> None:
    options = arrange(source, monkeypatch)
    out.mkdir()
    with pytest.raises(kind):
        quantconvert.convert(source, out, **options)
    assert snapshot(out) == {}


@pytest.mark.parametrize(("arrange", "kind"), FAILURES)
def test_failure_leaves_the_old_result(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, arrange: Any, kind: type[Exception]
) -> None:
    quantconvert.convert(source, out, scheme="W8A16", max_shard_size="100KB")
    before = snapshot(out)
    options = arrange(source, monkeypatch)
    with pytest.raises(kind):
        quantconvert.convert(source, out, overwrite=True, **options)
    assert snapshot(out) == before


@pytest.mark.parametrize("moment", [Started, ShardWritten])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_keeps_what_is_done(source: Path, out: Path, moment: type, error: type[BaseException]) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, moment):
            raise error

    with pytest.raises(error) as caught:
        quantconvert.convert(source, out, report=interrupt)
    if moment is Started:
        assert not out.exists()
        return
    assert caught.value.__notes__ == [
        "21 of 21 tasks are done and kept: the same command continues, --restart starts over"
    ]
    assert [path.name for path in out.iterdir()] == [".quantconvert"]


def test_a_side_file_that_vanishes_for_a_while(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = side_file_disappears(source, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot open `tokenizer.json` of the source: No such file"):
        quantconvert.convert(source, out, **options)
    assert [path.name for path in out.iterdir()] == [".quantconvert"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_of_the_last_move_is_undone(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        quantconvert.convert(source, out, scheme="W8A16", max_shard_size="100KB")
    before = snapshot(out)
    move = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == out / "config.json" and self.parent.name == ".quantconvert":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return move(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=re.escape(f"cannot move the result into `{out}`: Input/output error")):
        quantconvert.convert(source, out, overwrite=overwrite)
    shutil.rmtree(out / ".quantconvert")  # what is done; the rest is as it was
    assert snapshot(out) == (before or {})


def test_overwrite_replaces_the_old_result(source: Path, out: Path, tmp_path: Path) -> None:
    quantconvert.convert(source, out, scheme="W8A16", max_shard_size="100KB")
    quantconvert.convert(source, out, overwrite=True)
    quantconvert.convert(source, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["mxfp6-pack-quantized", "sparse-24-bitmask", "marlin-24"])
def test_a_compression_that_is_not_read_is_refused_once_by_name(tmp_path: Path, out: Path, name: str) -> None:
    tensors = llama_tensors()
    for module in [key.removesuffix(".weight") for key in tensors if "_proj" in key]:
        rows, columns = tensors.pop(f"{module}.weight").shape
        tensors |= {
            f"{module}.weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            f"{module}.weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            f"{module}.weight_global_scale": torch.ones(1),
        }
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    block = {"quant_method": "compressed-tensors", "format": name,
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    source = write_checkpoint(tmp_path / "source", tensors, LLAMA_CONFIG | {"quantization_config": block})
    message = f"the source is quantized as `{name}` (compressed-tensors), which is not read"
    assert refusals(source, out) == [(UnsupportedError, message, ORIGINAL)]
    with pytest.raises(UnsupportedError, match=message.replace("(", r"\(").replace(")", r"\)")):
        quantconvert.dequantize(source, out)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "`config.json` holds NaN, which is no number of JSON: expected a value or null"),
        ("[1, [NaN]]", "`config.json` holds NaN, which is no number of JSON: expected a value or null"),
        ("9" * 4000, "`config.json` holds a whole number of more than 1024 bits"),
    ],
    ids=["NaN", "NaN inside", "4,000 digits"],
)
def test_numbers_that_other_readers_of_config_json_stop_at(source: Path, out: Path, value: str, message: str) -> None:
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("{", f'{{"odd": {value}, ', 1))
    assert refusals(source, out) == [(CheckpointError, message, None)]


def test_infinity_is_kept_as_transformers_writes_it(source: Path, out: Path) -> None:
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    quantconvert.convert(source, out)
    assert json.loads((out / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]
