"""pytorch_model.bin: the same bytes as safetensors would give, no code of the file runs, and what is no checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from tests.builders import LLAMA_CONFIG, decode_rtn, llama_tensors, read_tensors, weight, write_checkpoint

CONFIG = LLAMA_CONFIG | {"num_hidden_layers": 1}
HEAD, TABLE, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj"


def write_config(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    return folder


def write_torch(folder: Path, value: Any, **options: Any) -> Path:
    """A folder with a config and `value` in pytorch_model.bin."""
    torch.save(value, write_config(folder) / "pytorch_model.bin", **options)
    return folder


def tensors_of(layers: int = 1) -> dict[str, Tensor]:
    return llama_tensors(layers=layers)


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return {path.name: path.read_bytes() for path in found if path.name != "quantconvert.json"}  # names the source


def convert(source: Path, out: Path, **options: Any) -> dict[str, bytes]:
    quantconvert.convert(source, out, **options)
    return files_of(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_file_gives_the_same_tensors(tmp_path: Path, dtype: torch.dtype):
    tensors = llama_tensors(layers=1, dtype=dtype)
    source = write_torch(tmp_path / "torch", tensors)
    convert(write_checkpoint(tmp_path / "safe", tensors, CONFIG), tmp_path / "a")
    convert(source, tmp_path / "b")
    one, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    assert not list((tmp_path / "b").glob("*.bin*"))


def test_files_are_the_same_bytes_where_the_order_is(tmp_path: Path):
    """Output follows the order of the source's bytes: with safetensors' own order in both, the files are one."""
    tensors = tensors_of()
    safe = write_checkpoint(tmp_path / "safe", tensors, CONFIG)
    ordered = {ref.name: tensors[ref.name] for ref in quantconvert.plan(safe).checkpoint.tensors}
    one = convert(safe, tmp_path / "a")
    other = convert(write_torch(tmp_path / "torch", ordered), tmp_path / "b")
    assert one == other


def write_shards(folder: Path, parts: list[dict[str, Tensor]]) -> Path:
    write_config(folder)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"pytorch_model-{i + 1:05d}-of-{len(parts):05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = list(tensors)
    return [{n: tensors[n].clone() for n in part} for part in (names[:5], names[5:])]


def test_shards_give_the_same_tensors(tmp_path: Path):
    tensors = tensors_of()
    convert(write_checkpoint(tmp_path / "safe", tensors, CONFIG, shards=2), tmp_path / "a")
    convert(write_shards(tmp_path / "torch", halves(tensors)), tmp_path / "b")
    one, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_quantized_tensors_in_torch_files(tmp_path: Path):
    from tests.inputs import fp8_model

    model = fp8_model()
    source = write_torch(tmp_path / "torch", model.tensors)
    (source / "config.json").write_text(json.dumps(model.config))
    quantconvert.dequantize(source, tmp_path / "out", "float32")
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], w.float()) for name, w in model.expected.items())


def test_views_into_one_storage_are_read_at_their_place(tmp_path: Path):
    tensors = tensors_of()
    q, k, v = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    fused = torch.cat([tensors[q], tensors[k], tensors[v]])
    views = {q: fused[:128], k: fused[128:192], v: fused[192:]}
    source = write_torch(tmp_path / "torch", tensors | views)
    convert(source, tmp_path / "b", ignore=["*.self_attn.*"])
    found = read_tensors(tmp_path / "b")
    assert all(torch.equal(found[name], tensors[name]) for name in (q, k, v))


@pytest.mark.parametrize("kind", ["state_dict", "parameters"])
def test_what_modules_save(tmp_path: Path, kind: str):
    """`state_dict()` has metadata beside its tensors; some files hold parameters instead of tensors."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": torch.nn.Linear(64, 96, bias=False)})})
    saved = model.state_dict() if kind == "state_dict" else dict(model.named_parameters())
    source = write_config(write_torch(tmp_path / "torch", saved), model_type="unknown")
    quantconvert.convert(source, tmp_path / "out", group_size=32, bits=8, format="rtn")
    found, w = read_tensors(tmp_path / "out"), saved["layers.0.weight"].detach()
    error = (decode_rtn(found, "layers.0", 8) - w).abs()
    assert bool((error <= found["layers.0.weight_scale"].repeat_interleave(32, 1) * 0.501).all())


# Tied and shared tensors


def tied(folder: Path, **more: Any) -> Path:
    tensors = tensors_of()
    tensors[HEAD] = tensors[TABLE]
    write_torch(folder, tensors)
    return write_config(folder, **more)


def test_a_tied_head_is_dropped_with_a_reason(tmp_path: Path):
    source = tied(tmp_path / "torch", tie_word_embeddings=True)
    plan = quantconvert.plan(source)
    (name, reason), *rest = plan.to_json()["dropped_tensors"].items()
    assert not rest
    assert {name, reason.split("`")[1]} == {HEAD, TABLE}
    assert reason.startswith("the same bytes as `")
    assert plan.accounts["dropped"] == 1
    quantconvert.convert(source, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert len({HEAD, TABLE} & set(found)) == 1
    assert TABLE in found


def test_a_head_that_the_config_unties_is_kept(tmp_path: Path):
    source = tied(tmp_path / "torch", tie_word_embeddings=False)
    quantconvert.convert(source, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found[HEAD], found[TABLE])
    assert quantconvert.plan(source).dropped == ()


def test_other_shared_tensors_are_written_twice(tmp_path: Path):
    tensors = tensors_of(2)
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(2)]
    tensors[two], tensors[norms[1]] = tensors[one], tensors[norms[0]]
    source = write_config(write_torch(tmp_path / "torch", tensors), num_hidden_layers=2, tie_word_embeddings=True)
    quantconvert.convert(source, tmp_path / "out", format="compressed-tensors")
    found = read_tensors(tmp_path / "out")
    for suffix in ("weight_packed", "weight_scale"):
        first, second = (found[name.replace("weight", suffix)] for name in (one, two))
        assert torch.equal(first, second)
    assert torch.equal(found[norms[0]], found[norms[1]])
    assert quantconvert.plan(source).dropped == ()


# Refusals


class Hostile:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refusal(source: Path, kind: type[Exception] = quantconvert.CheckpointError) -> str:
    with pytest.raises(kind) as info:
        quantconvert.plan(source)
    return str(info.value)


def test_code_in_a_pickle_does_not_run(tmp_path: Path):
    made = tmp_path / "made"
    source = write_torch(tmp_path / "torch", tensors_of() | {"x": Hostile(made)})
    message = refusal(source)
    assert "`pytorch_model.bin` holds more than weights, or is damaged" in message
    assert "mkdir" in message
    assert not made.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)  # it would have
    assert made.exists()


def test_code_in_an_old_pickle_does_not_run(tmp_path: Path):
    made = tmp_path / "made"
    source = write_torch(tmp_path / "torch", {"x": Hostile(made)}, _use_new_zipfile_serialization=False)
    assert "cannot be memory-mapped" in refusal(source)
    assert not made.exists()


def test_files_from_before_zip_are_refused(tmp_path: Path):
    source = write_torch(tmp_path / "torch", tensors_of(), _use_new_zipfile_serialization=False)
    message = refusal(source)
    assert "`pytorch_model.bin` cannot be memory-mapped as a torch file" in message
    assert "older than torch 1.6" in message
    assert "save it again as safetensors" in message


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"epoch": 3}, "`pytorch_model.bin` holds `epoch`, a int: expected tensors by name and nothing else"),
        ({"state_dict": {"a": torch.ones(2)}}, "holds `state_dict`, a dict: expected tensors by name"),
        ({7: torch.ones(2)}, "holds `7`, a "),
        ({"a": weight(4, 8).t()}, "tensor `a` in `pytorch_model.bin` is a view with strides [1, 8]"),
        ({"a": weight(4, 8)[:, ::2]}, "tensor `a` in `pytorch_model.bin` is a view with strides [8, 2]"),
        ({"a": torch.ones(4, 4).to_sparse()}, "`a"),
    ],
    ids=["number", "nested", "name", "turned", "strided", "sparse"],
)
def test_values_that_are_no_plain_tensors(tmp_path: Path, extra: dict[Any, Any], message: str):
    source = write_torch(tmp_path / "torch", tensors_of() | extra)
    assert message in refusal(source)


def test_no_dictionary(tmp_path: Path):
    source = write_torch(tmp_path / "torch", [torch.ones(2)])
    assert "`pytorch_model.bin` holds a list: expected a dictionary of tensors" in refusal(source)


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01, 0.0])
def test_truncated_file(tmp_path: Path, keep: float):
    path = write_torch(tmp_path / "torch", tensors_of()) / "pytorch_model.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    expected = "cannot be memory-mapped as a torch file" if keep else "is empty: expected weights, got 0 bytes"
    assert f"`pytorch_model.bin` {expected}" in refusal(path.parent)


def rezip(path: Path, **changed: bytes) -> None:
    """The archive again, compressed where nothing is `changed`, else with entries that end in that name replaced."""
    method = zipfile.ZIP_STORED if changed else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w", method) as new:
        for entry in old.infolist():
            replaced = next((raw for name, raw in changed.items() if entry.filename.endswith(name)), None)
            new.writestr(entry.filename, old.read(entry) if replaced is None else replaced)
    path.with_suffix(".new").replace(path)


def test_compressed_archive(tmp_path: Path):
    path = write_torch(tmp_path / "torch", tensors_of()) / "pytorch_model.bin"
    rezip(path)
    assert "`pytorch_model.bin` is compressed: expected a torch file as torch.save writes it" in refusal(path.parent)


@pytest.mark.parametrize("order", [b"big", b"", b"little" * 100])
def test_archive_written_in_another_byte_order(tmp_path: Path, order: bytes):
    """torch swaps the bytes even of tensors that it was asked not to load, and ends the process."""
    path = write_torch(tmp_path / "torch", tensors_of()) / "pytorch_model.bin"
    rezip(path, byteorder=order)
    assert "`pytorch_model.bin` has a byte order other than little endian" in refusal(path.parent)


def test_archive_whose_data_are_shorter_than_its_table_says(tmp_path: Path):
    path = (
        write_torch(tmp_path / "torch", {"model.layers.0.mlp.up_proj.weight": weight(256, 128)}) / "pytorch_model.bin"
    )
    rezip(path, **{"data/0": b"\0" * 100})
    assert "pytorch_model.bin" in refusal(path.parent)


def test_missing_shard(tmp_path: Path):
    source = write_shards(tmp_path / "torch", halves(tensors_of()))
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    message = refusal(source)
    assert "`pytorch_model-00002-of-00002.bin` is missing: `pytorch_model.bin.index.json` says that it holds" in message


def test_tensor_that_is_not_where_the_index_puts_it(tmp_path: Path):
    parts = halves(tensors_of())
    source = write_shards(tmp_path / "torch", parts)
    torch.save({name: t for name, t in parts[0].items() if name != TABLE}, source / "pytorch_model-00001-of-00002.bin")
    assert f"tensor `{TABLE}` is not in `pytorch_model-00001-of-00002.bin`, where `pytorch_model.bin.index.json`" in (
        refusal(source)
    )


def test_the_same_tensor_in_two_shards(tmp_path: Path):
    parts = halves(tensors_of())
    source = write_shards(tmp_path / "torch", [parts[0], parts[1] | {TABLE: parts[0][TABLE]}])
    assert f"tensor `{TABLE}` exists twice" in refusal(source)


def test_safetensors_are_preferred(tmp_path: Path):
    source = write_checkpoint(tmp_path / "both", tensors_of(), CONFIG)
    shutil.copytree(source, tmp_path / "safe")
    (source / "pytorch_model.bin").write_bytes(b"not a torch file")
    plan = quantconvert.plan(source)
    assert [file.path for file in plan.checkpoint.weight_files] == ["model.safetensors"]
    assert [file.path for file in plan.checkpoint.dropped_files] == ["pytorch_model.bin"]
    assert convert(source, tmp_path / "a") == convert(tmp_path / "safe", tmp_path / "b")
