"""What verification makes of factors: those of a result, those that are damaged, and those of its source."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.errors import CheckpointError, VerificationError
from quantconvert.factors import FACTORS, read_places
from tests.builders import write_checkpoint
from tests.equalized import NORM, OPTIONS, copied, factors_of, flip, loud, repair, vectors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("loud") / "in", loud())


@pytest.fixture(scope="module")
def result(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "out"
    quantconvert.convert(source, out, verify=True, **OPTIONS)
    return out


def test_the_report_tells_the_factors(result: Path):
    report = json.loads((result / "quantconvert.json").read_text())
    factors = factors_of(result)
    assert len(factors) == 8
    assert set(report["factors"]) == {"model.layers.0", "model.layers.1"}
    low, high = report["factors"]["model.layers.0"]["self_attn.v_proj"]
    found = factors["model.layers.0.self_attn.v_proj"]
    assert (low, high) == pytest.approx((float(found.min()), float(found.max())), rel=1e-5)
    assert NORM in report["changed"]
    assert len(report["changed"]) == 4
    assert report["job"]["equalize"] is True


def test_verify_finds_a_factor_that_was_changed(source: Path, result: Path, tmp_path: Path):
    assert quantconvert.verify(result, source).is_ok
    for name, expected in (("input_layernorm", "values"), ("self_attn.v_proj", "values")):
        out = copied(result, tmp_path / name)
        place = read_places(out)[f"model.layers.0.{name}"]
        flip(out, place.offset + 8 * 4 + 2)
        found = quantconvert.verify(out, source)
        assert found.failed == "checksums"
        repair(out)  # as somebody would who knows about checksums
        found = quantconvert.verify(out, source)
        assert found.failed == expected, found.findings


def test_verify_misses_the_file_of_factors(source: Path, result: Path, tmp_path: Path):
    out = copied(result, tmp_path / "out")
    (out / FACTORS).unlink()
    found = quantconvert.verify(out, source)
    assert {finding.where for finding in found.findings} >= {FACTORS, NORM}


def test_a_changed_norm_is_found(source: Path, result: Path, tmp_path: Path):
    out = copied(result, tmp_path / "out")
    checkpoint = next(
        path for path in sorted(out.glob("*.safetensors")) if NORM in path.read_bytes()[:20000].decode("latin1")
    )
    content = checkpoint.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    begin = json.loads(content[8 : 8 + size])[NORM]["data_offsets"][0]
    flip(out, 8 + size + begin + 6, checkpoint.name)
    repair(out)
    found = quantconvert.verify(out, source)
    assert [finding.where for finding in found.findings] == [NORM]


def test_repacked_codes_are_judged_by_the_same_factors(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    quantconvert.convert(source, out, equalize=True, symmetric=True, format="compressed-tensors", group_size=32)
    quantconvert.repack(out, tmp_path / "gptq", "gptq")
    assert quantconvert.verify(tmp_path / "gptq", source).is_ok


def test_what_comes_from_a_result_has_its_factors_already(source: Path, tmp_path: Path):
    """A result that is repacked or dequantized keeps its factors; its source's tensors have them, too."""
    out = tmp_path / "out"
    quantconvert.convert(source, out, equalize=True, symmetric=True, format="compressed-tensors", group_size=32)
    quantconvert.repack(out, tmp_path / "gptq", "gptq", verify=True)
    quantconvert.dequantize(out, tmp_path / "floats", verify=True)
    for name in ("gptq", "floats"):
        assert factors_of(tmp_path / name).keys() == factors_of(out).keys()
        assert quantconvert.verify(tmp_path / name, out).is_ok
    quantconvert.convert(tmp_path / "floats", tmp_path / "again", verify=True, **OPTIONS)
    assert quantconvert.verify(tmp_path / "again", tmp_path / "floats").is_ok
    assert not quantconvert.verify(tmp_path / "again", source).is_ok


@pytest.mark.parametrize("metadata", [None, {}], ids=["null", "empty"])
def test_factors_without_a_checksum_are_damaged(metadata: object, tmp_path: Path):
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / FACTORS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="was changed: expected sha256 None"):
        read_places(tmp_path)


def test_a_vector_of_nothing_is_none(tmp_path: Path):
    (tmp_path / FACTORS).write_bytes(vectors({"a": 1, "b": 0}))
    with pytest.raises(CheckpointError, match="expected vectors of F32"):
        read_places(tmp_path)


@pytest.mark.parametrize("content", [b"not factors", vectors({"a": 1, "b": 0})], ids=["text", "empty vector"])
def test_what_a_source_calls_factors_is_a_file_like_others(result: Path, tmp_path: Path, content: bytes):
    """Its content is nobody's business before it is verified: codes are repacked as they are."""
    source = copied(result, tmp_path / "in")
    (source / FACTORS).write_bytes(content)
    quantconvert.dequantize(source, tmp_path / "out", verify=True)
    assert (tmp_path / "out" / FACTORS).read_bytes() == content


def test_vectors_without_a_place_are_one_finding(source: Path, result: Path, tmp_path: Path):
    out = copied(result, tmp_path / "out")
    (out / FACTORS).write_bytes(vectors({f"../a{i}": 1 for i in range(1000)}))
    found = [finding for finding in quantconvert.verify(out, source).findings if finding.where == FACTORS]
    assert [finding.message.partition(":")[0] for finding in found] == [
        "was changed after the conversion",
        "has 1000 vectors without a place in the source",
    ]


@pytest.mark.parametrize("job", [{"rotate": "r3"}, {"steps": ["r3"]}], ids=str)
def test_a_report_of_steps_that_are_not_known(source: Path, result: Path, tmp_path: Path, job: dict[str, object]):
    out = copied(result, tmp_path / "out")
    report = json.loads((out / "quantconvert.json").read_text())
    report["job"] |= job
    (out / "quantconvert.json").write_text(json.dumps(report))
    repair(out)
    (finding,) = quantconvert.verify(out, source).findings
    assert (finding.where, finding.message) == ("quantconvert.json", "names steps that are not known here: `r3`")


def test_the_last_check_hears_of_a_wrong_step(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step that did nothing to norms would leave a broken model: --verify compares with what should have been."""
    from quantconvert.run import tiled, work
    from quantconvert.sources import open_rows as real

    def broken(read: Any, *rest: Any) -> Any:
        from dataclasses import replace

        return real(replace(read, steps=()) if read.name == NORM else read, *rest)

    monkeypatch.setattr(work, "find_direct", lambda way: None)
    monkeypatch.setattr(tiled, "open_rows", broken)
    with pytest.raises(VerificationError, match="input_layernorm"):
        quantconvert.convert(source, tmp_path / "out", verify=True, **OPTIONS)
