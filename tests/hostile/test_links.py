"""Links, names and side files: what may be followed, what is copied, and that nothing is read or written elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert import CheckpointError, OutputError
from quantconvert.checkpoint import load_checkpoint
from tests.hostile.build import CONFIG, LAYER, NBYTES, SINGLE, good, link
from tests.hostile.memory_repo import MemoryRepo
from tests.raw_files import entry, shard


def cached(root: Path) -> Path:
    """A good checkpoint as huggingface_hub's cache holds it: every file a link to a blob. Returns the snapshot."""
    repo = root / "models--acme--tiny"
    snapshot = good(repo / "snapshots" / "0123456789abcdef")
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / f"{i:064x}")
        path.symlink_to(f"../../blobs/{i:064x}")
    return snapshot


def test_a_snapshot_in_the_cache_converts(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub")
    quantconvert.convert(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    link(tmp_path, "short", snapshot)
    assert quantconvert.plan(tmp_path / "short").quantized


@pytest.mark.parametrize("target", ["../../../secret.txt", "../../refs/main", "../../blobs/evil", "../other/x"])
def test_a_snapshot_links_only_to_its_own_blobs(tmp_path: Path, target: str) -> None:
    snapshot = cached(tmp_path)
    for path in (tmp_path / "secret.txt", snapshot.parents[1] / "refs" / "main", snapshot.parent / "other" / "x"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("secret")
    link(snapshot.parents[1] / "blobs", "evil", tmp_path / "secret.txt")
    link(snapshot, "vocab.txt", target)
    with pytest.raises(CheckpointError, match=r"`vocab\.txt` is a link out of the source, to `/"):
        quantconvert.convert(snapshot, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blobs_elsewhere_are_no_blobs(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (snapshot.parents[1] / "blobs").rename(tmp_path / "elsewhere")
    link(snapshot.parents[1], "blobs", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"`config\.json`, .* are links out of the source, to `.*/elsewhere`"):
        quantconvert.plan(snapshot)


def farm(folder: Path, *homes: Path) -> Path:
    """A folder of nothing but links, to the same files in one folder or by turns in several."""
    folder.mkdir()
    for i, path in enumerate(sorted(good(homes[0]).iterdir())):
        home = good(homes[i % len(homes)])
        link(folder, path.name, home / path.name)
    return folder


def test_a_farm_of_links_is_one_refusal_that_names_their_home(tmp_path: Path) -> None:
    source, home = farm(tmp_path / "links", tmp_path / "home"), tmp_path / "home"
    with pytest.raises(CheckpointError) as info:
        quantconvert.plan(source)
    names = "`config.json`, `model.safetensors`, `tokenizer.json`"
    assert info.value.message == f"{names} are links out of the source, to `{home}`"
    assert info.value.hint == f"give `{home}` itself as the source"
    assert quantconvert.plan(home).quantized


@pytest.mark.process
def test_a_farm_of_links_to_several_folders(tmp_path: Path) -> None:
    source = farm(tmp_path / "links", tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError) as info:
        quantconvert.plan(source)
    hint = str(info.value.hint)
    assert hint == f"`cp -rL {source} DIR` copies what they lead to; with `-l` too it takes no space on one disk"
    subprocess.run(["cp", "-rlL", source, tmp_path / "copy"], check=True)
    assert quantconvert.plan(tmp_path / "copy").quantized
    assert (tmp_path / "copy" / CONFIG).stat().st_ino == (tmp_path / "a" / CONFIG).stat().st_ino


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    source = good(tmp_path / "source")
    (source / "data").mkdir()
    (source / "data" / "vocab.json").write_text('{"a": 1}')
    link(source, "vocab.json", "data/vocab.json")
    link(source, "merges.txt", source / "data" / "vocab.json")
    quantconvert.convert(source, tmp_path / "out")
    for name in ("vocab.json", "merges.txt", "data/vocab.json"):
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_text() == '{"a": 1}'


def test_a_name_that_begins_like_the_source_is_outside(tmp_path: Path) -> None:
    source = good(tmp_path / "source")
    good(tmp_path / "source-of-others")
    link(source, "tokenizer.json", "../source-of-others/tokenizer.json")
    with pytest.raises(CheckpointError, match=r"`tokenizer\.json` is a link out of the source"):
        quantconvert.plan(source)


def test_hidden_things_are_left_alone(tmp_path: Path) -> None:
    source = good(tmp_path / "source")
    link(source, ".git", "/")
    link(source, ".netrc", "/etc/passwd")
    (source / ".cache").mkdir()
    os.mkfifo(source / ".cache" / "fifo")
    quantconvert.convert(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        CONFIG,
        SINGLE,
        "README.md",
        "quantconvert.json",
        "tokenizer.json",
    }


SWAP = """
import os, sys
import quantconvert
from quantconvert.events import Started
def swap(event):
    if isinstance(event, Started):
        os.unlink(sys.argv[1] + "/tokenizer.json")
        os.mkfifo(sys.argv[1] + "/tokenizer.json")
try:
    quantconvert.convert(sys.argv[1], sys.argv[2], report=swap)
except quantconvert.CheckpointError as error:
    print(error)
"""


@pytest.mark.process
def test_a_fifo_in_the_place_of_a_side_file_does_not_block(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SWAP, str(good(tmp_path / "source")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "cannot open `tokenizer.json` of the source: not a regular file\n"
    assert issubclass(OutputError, quantconvert.QuantConvertError)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "a//x", "./x", "", "a\\x"])
def test_a_repository_cannot_name_files_outside(path: str) -> None:
    """Names also come from the Hub's answer, and side files are written under theirs."""
    with pytest.raises(CheckpointError, match="of `memory` is no path inside it"):
        load_checkpoint(MemoryRepo({CONFIG: b"{}", path: b""}))


def test_tensor_names_are_no_paths(tmp_path: Path) -> None:
    source = good(tmp_path / "area" / "source")
    names = ["../../x.weight", "/tmp/x", "a/../b", "C:\\x", "~/x", "$(touch x)", "%s%n", "[red]x[/red]"]
    header: dict[str, Any] = {LAYER: entry(0, NBYTES, [128, 128])}
    header |= {name: entry(NBYTES + 2 * i, NBYTES + 2 * i + 2) for i, name in enumerate(names)}
    shard(source / SINGLE, header, NBYTES + 2 * len(names))
    before = sorted(tmp_path.rglob("*"))
    quantconvert.convert(source, tmp_path / "area" / "out", workers=2, max_shard_size="4KB", allow_incomplete=True)
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.is_relative_to(tmp_path / "area" / "out") for path in made)
    index = json.loads((tmp_path / "area" / "out" / "model.safetensors.index.json").read_text())
    assert set(names) <= set(index["weight_map"])


class Bomb:
    """What unpickling this would run leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.process
def test_nothing_from_the_source_is_executed(tmp_path: Path) -> None:
    source, mark = good(tmp_path / "source"), tmp_path / "mark"
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pkl"):
        (source / name).write_bytes(pickle.dumps(Bomb(mark)))
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py", "sitecustomize.py", "conftest.py"):
        (source / name).write_text(code)
    auto = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    (source / CONFIG).write_text(json.dumps({"model_type": "llama", "auto_map": auto, "trust_remote_code": True}))
    (source / "README.md").write_text(f"---\na: !!python/object/apply:os.mkdir ['{mark}']\n---\n")
    for command in (["plan", "."], ["inspect", "."], [".", str(tmp_path / "out"), "--quiet"]):
        done = subprocess.run([sys.executable, "-P", "-m", "quantconvert", *command], cwd=source, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert not mark.exists()
