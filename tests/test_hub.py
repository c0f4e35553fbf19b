"""A Hub repository as source, through the real huggingface_hub against a server on the loopback address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import quantconvert
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.hub_server import COMMIT, REPO, serve
from tests.snapshots import digests


def run(endpoint: str, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret_token_for_the_test",
    }
    command = [sys.executable, "-m", "quantconvert", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Two shards of about 3 MB each, with duplicates in other forms beside them."""
    tensors = llama_tensors(hidden=512, intermediate=1024)
    folder = write_checkpoint(tmp_path / "repo", tensors, LLAMA_CONFIG | {"hidden_size": 512}, shards=2)
    for name in ("tokenizer.json", "pytorch_model.bin", "consolidated.safetensors", "original/x.pth", "model.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 10_000)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def test_plan_reads_headers_only(repo: Path, tmp_path: Path):
    with serve(repo) as (endpoint, requests):
        done = run(endpoint, tmp_path / "cache", "plan", REPO, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["source"] == REPO
    assert plan["revision"] == COMMIT
    assert plan["num_quantized"] == 14
    fetched: Counter[str] = Counter()
    for name, _, nbytes in requests:
        fetched[name] += nbytes
    for shard in repo.glob("model-*.safetensors"):
        assert 0 < fetched[shard.name] <= shard.stat().st_size / 2
    assert not {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "tokenizer.json"} & set(fetched)


def test_convert_downloads_only_what_it_needs_and_equals_a_local_conversion(repo: Path, tmp_path: Path):
    with serve(repo) as (endpoint, requests):
        done = run(endpoint, tmp_path / "cache", REPO, str(tmp_path / "out"), "--revision", "main", "--quiet")
    assert done.returncode == 0, done.stderr
    assert not {"pytorch_model.bin", "consolidated.safetensors", "x.pth", "model.gguf"} & {r[0] for r in requests}
    quantconvert.convert(repo, tmp_path / "local")
    ours, local = digests(tmp_path / "out"), digests(tmp_path / "local")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert COMMIT in card
    assert "hf_secret" not in card + done.stderr
    for name in ("README.md", "quantconvert.json"):  # both name the source
        del ours[name], local[name]
    assert ours == local


def test_a_refusal_downloads_no_weights(repo: Path, tmp_path: Path):
    with serve(repo) as (endpoint, requests):
        done = run(endpoint, tmp_path / "cache", REPO, str(tmp_path / "out"), "--group-size", "96")
    assert done.returncode == 4
    for shard in repo.glob("model-*.safetensors"):
        assert sum(nbytes for name, _, nbytes in requests if name == shard.name) < shard.stat().st_size / 2
    assert not (tmp_path / "out").exists()


def test_unknown_repository(repo: Path, tmp_path: Path):
    with serve(repo) as (endpoint, _):
        done = run(endpoint, tmp_path / "cache", "acme/typo", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "`acme/typo` is no local folder, and the Hub does not give it" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_uses_what_is_in_the_cache(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serve(repo) as (endpoint, _):
        first = run(endpoint, tmp_path / "cache", REPO, str(tmp_path / "out"), "--quiet")
        assert first.returncode == 0, first.stderr
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        again = run(endpoint, tmp_path / "cache", REPO, str(tmp_path / "again"), "--quiet")
        unknown = run(endpoint, tmp_path / "cache", "acme/never-seen", str(tmp_path / "x"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert f"`{COMMIT}`" in (tmp_path / "again" / "README.md").read_text()
    assert unknown.returncode == 3
    assert "Traceback" not in unknown.stderr
