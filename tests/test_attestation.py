"""A statement that in-toto's own validator takes: digests of what was read, and a verdict for each weight."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from tests.builders import read_tensors, write_checkpoint
from tests.snapshots import digests


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "in")


def attested(out: Path, source: Path, file: Path) -> dict[str, Any]:
    found = quantconvert.verify(out, source, attest=str(file))
    assert found.is_ok
    statement: dict[str, Any] = json.loads(file.read_text())
    return statement


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_in_toto_s_schema(source: Path, tmp_path: Path):
    """By the package that in-toto publishes for it: the types of its protobuf, and its `validate`."""
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    quantconvert.convert(source, tmp_path / "out", group_size=32)
    given = attested(tmp_path / "out", source, tmp_path / "statement.json")
    message = ParseDict(given, statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    files = {subject["name"]: subject["digest"]["sha256"] for subject in given["subject"]}
    assert files == {path.name: sha256(path) for path in (tmp_path / "out").iterdir()}
    predicate = given["predicate"]
    assert predicate["source"]["files"] == [
        {"name": "model.safetensors", "digest": {"sha256": sha256(source / "model.safetensors")}}
    ]
    assert predicate["conversion"]["options"]["base"]["group_size"] == 32
    assert len(predicate["verdict"]["weights"]) == 14
    assert {w["verdict"] for w in predicate["verdict"]["weights"].values()} == {
        "derived from the source as round to nearest (RTN) promises"
    }
    again = attested(tmp_path / "out", source, tmp_path / "again.json")
    assert again == given


def test_other_tools_get_an_honest_verdict(source: Path, tmp_path: Path):
    """Without a report nobody has promised anything: what is nearest says so, and what is not says how far it is."""
    quantconvert.convert(source, tmp_path / "out", group_size=32, format="compressed-tensors", equalize=False)
    (tmp_path / "out" / "quantconvert.json").unlink()
    path = tmp_path / "out" / "model.safetensors"
    tensors = read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight_packed"][0, 0] ^= 8
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    weights = attested(tmp_path / "out", source, tmp_path / "s.json")["predicate"]["verdict"]["weights"]
    assert "not the nearest: at most" in weights[f"{name}.weight"]["verdict"]
    assert "not derived by rounding" in weights[f"{name}.weight"]["verdict"]
    others = {w["verdict"] for key, w in weights.items() if key != f"{name}.weight"}
    assert "codes are the nearest to the source's values" in others


def test_refusals(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "out", group_size=32)
    with pytest.raises(quantconvert.UsageError, match="--attest needs --source"):
        quantconvert.verify(tmp_path / "out", attest=str(tmp_path / "s.json"))
    (tmp_path / "s.json").write_text("mine")
    with pytest.raises(quantconvert.OutputError, match="exists"):
        quantconvert.verify(tmp_path / "out", source, attest=str(tmp_path / "s.json"))
    assert (tmp_path / "s.json").read_text() == "mine"
    before = digests(tmp_path)
    with pytest.raises(quantconvert.OutputError, match="cannot write"):
        quantconvert.verify(tmp_path / "out", source, attest=str(tmp_path / "none" / "s.json"))
    assert digests(tmp_path) == before


def test_nothing_is_attested_of_what_is_wrong(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "out", group_size=32)
    with open(tmp_path / "out" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert not quantconvert.verify(tmp_path / "out", source, attest=str(tmp_path / "s.json")).is_ok
    assert not (tmp_path / "s.json").exists()


def test_the_cache_of_the_hub_names_contents(source: Path, tmp_path: Path):
    """Its blobs are named by their sha256: the report has it without reading them."""
    repo = tmp_path / "models--me--m"
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in source.iterdir():
        name = sha256(path) if path.suffix == ".safetensors" else "a" * 40
        (repo / "blobs" / name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(repo / "blobs" / name)
    quantconvert.convert(snapshot, tmp_path / "out", group_size=32)
    report = json.loads((tmp_path / "out" / "quantconvert.json").read_text())
    assert report["source"]["sha256"] == {"model.safetensors": sha256(source / "model.safetensors")}
