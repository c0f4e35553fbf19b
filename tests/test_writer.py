"""The streamed files: equal to safetensors' own writer's, readable by its reader, the same for any cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantconvert
from quantconvert.events import silent
from quantconvert.planning.place import split_shards
from quantconvert.run.folder import OutputFolder
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.snapshots import digests

EVERY_DTYPE = (
    "bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "int16", "uint16", "float16",
    "bfloat16", "int32", "uint32", "float32", "complex64", "float64", "int64", "uint64",
)  # fmt: skip


def kept_of_every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"extra.{name}.buffer": torch.ones(3, 8).to(getattr(torch, name)) for name in EVERY_DTYPE}
    return tensors | {
        "extra.scalar": torch.tensor(3.0),
        "extra.empty": torch.empty(0, 4),
        "extra.ünïcode": torch.ones(1),
    }


@pytest.mark.parametrize("fmt", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("extra", [False, True])
def test_bytes_equal_safetensors_own_writer(tmp_path: Path, fmt: str, shards: int, extra: bool):
    tensors = llama_tensors() | (kept_of_every_dtype() if extra else {})
    source = write_checkpoint(tmp_path / "source", tensors, shards=shards)
    quantconvert.convert(source, tmp_path / "out", format=fmt)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    save_file(read_tensors(tmp_path / "out"), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_index_and_total_size(tmp_path: Path):
    source = write_checkpoint(tmp_path / "source", shards=2)
    result = quantconvert.convert(source, tmp_path / "out", max_shard_size="60KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    total = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(name)
                assert index["weight_map"][name] == file
                total += tensor.numel() * tensor.element_size()
    assert index["metadata"]["total_size"] == total == result.plan.total_size
    assert set(index["weight_map"]) == set(read_tensors(tmp_path / "out"))


def test_split_shards_keeps_units_whole_and_lets_a_giant_have_its_own_file():
    assert split_shards([4, 4, 4], 8) == [0, 0, 1]
    assert split_shards([1, 100, 1], 8) == [0, 1, 2]
    assert split_shards([0, 0], 8) == [0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"format": "awq"},
        {"format": "awq", "group_size": -1},
        {"format": "compressed-tensors", "symmetric": False},
        {"format": "compressed-tensors", "bits": 8, "group_size": 0, "symmetric": False},
        {"format": "compressed-tensors", "bits": 8, "group_size": -1},
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_same_bytes_for_any_worker_count_and_cut(tmp_path: Path, options, monkeypatch: pytest.MonkeyPatch):
    """Workers 1, 2, 4; memory limits that cut slabs; tiles from the whole tensor down to the fewest rows."""
    tensors = llama_tensors(layers=1) | {"model.layers.0.mlp.down_proj.weight": weight(128, 4096, seed=99)}
    tensors |= {f"model.layers.0.mlp.{name}_proj.weight": weight(4096, 128, seed=5) for name in ("gate", "up")}
    source = write_checkpoint(
        tmp_path / "source", tensors, LLAMA_CONFIG | {"num_hidden_layers": 1, "intermediate_size": 4096}, shards=2
    )
    seen = []
    for i, (workers, limit, tile) in enumerate(
        [(1, "2GB", 1 << 19), (2, "2GB", 1 << 19), (4, "2GB", 1 << 16), (2, "150KB", 1 << 10), (4, "250KB", 1 << 12)]
    ):
        monkeypatch.setattr("quantconvert.planning.memory.TILE_ELEMENTS", tile)
        monkeypatch.setattr("quantconvert.planning.memory.TILE_BYTES", 1)
        monkeypatch.setattr("quantconvert.methods.rtn.Rtn.scratch", lambda self, scheme: 0)
        quantconvert.convert(source, tmp_path / f"out{i}", workers=workers, memory_limit=limit, **options)
        seen.append(digests(tmp_path / f"out{i}"))
    assert all(other == seen[0] for other in seen[1:])


def test_side_files_travel_and_duplicates_stay(tmp_path: Path):
    source = write_checkpoint(tmp_path / "source")
    keep = ["tokenizer.json", "chat_template.jinja", "modeling_x.py", "LICENSE", "1_Pooling/config.json", "a/b/c.txt",
            "2_Dense/model.safetensors", "generation_config.json", ".gitattributes"]  # fmt: skip
    drop = ["pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "model.gguf", "params.json",
            "original/params.json", "onnx/model.onnx", "quantize_config.json", "tf_model.h5",
            "pytorch_model-00001-of-00002.bin"]  # fmt: skip
    for path in keep + drop:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(b"content of " + path.encode())
    (source / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Old card\n\nText.\n")
    result = quantconvert.convert(source, tmp_path / "out", group_size=32)
    found = set(digests(tmp_path / "out"))
    assert found == {*keep, "README.md", "config.json", "model.safetensors", "quantconvert.json", "quantconvert.svg"}
    for path in keep:
        assert (tmp_path / "out" / path).read_bytes() == b"content of " + path.encode()
    assert {file.path for file in result.plan.checkpoint.dropped_files} == set(drop)
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in ("license: mit", "int4 g32 asymmetric", "\n```bash\nquantconvert SRC OUT --group-size 32\n```\n",
                     f"quantconvert {quantconvert.__version__}",
                     "\n## Card of the base model\n", "\n### Old card\n"):  # fmt: skip
        assert expected in card
    assert "base_model" not in card, "a folder's name is no repository, and may be private"


def test_overwrite_replaces_and_removes_stale_weights(tmp_path: Path):
    source = write_checkpoint(tmp_path / "source", shards=2)
    out = tmp_path / "out"
    quantconvert.convert(source, out, max_shard_size="60KB")
    (out / "notes.txt").write_text("mine")
    quantconvert.convert(source, out, overwrite=True, format="compressed-tensors")
    ours = {"quantconvert.json", "quantconvert.svg"}
    assert set(digests(out)) == {"README.md", "config.json", "model.safetensors", "notes.txt"} | ours
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"


def test_an_interrupted_overwrite_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed between two moves of a commit: nothing is lost, and the next run restores the old checkpoint first."""
    source, out = write_checkpoint(tmp_path / "source"), tmp_path / "out"
    quantconvert.convert(source, out, max_shard_size="60KB")
    before = digests(out)

    class Killed(BaseException):
        pass

    def takes_nothing_back(out: Path) -> None:
        raise Killed

    moves = []
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == 6:
            raise Killed
        return real(self, target)

    folder = OutputFolder(out, silent)
    folder.acquire()
    folder.resume(quantconvert.plan(source), restart=False).close()
    for name in ("model.safetensors", "config.json"):
        folder.write(name, b"new")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr("quantconvert.run.folder.commit.restore", takes_nothing_back)
        with pytest.raises(Killed):
            folder.commit()
    folder.release()
    assert digests(out) != before
    assert not (out / "config.json").exists()
    with pytest.raises(quantconvert.OutputError, match="exists and is not empty"):
        quantconvert.convert(source, out)
    with pytest.raises(quantconvert.QuantConvertError):
        quantconvert.convert(source, out, overwrite=True, group_size=24)  # refused at plan time: nothing is touched
    folder = OutputFolder(out, silent)
    folder.acquire()
    folder.abandon()
    folder.release()
    assert digests(out) == before
