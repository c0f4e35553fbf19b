"""A Hub repository as source, through the real huggingface_hub against a server on the loopback address."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import quantconvert
from quantconvert.checkpoint import RepoFile
from quantconvert.hub import WAITS, HubReader, may_pass, retried, status_of
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.hub_server import COMMIT, REPO, serve
from tests.snapshots import digests


def run(endpoint: str, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_python(endpoint, cache, "-m", "quantconvert", *words)


def run_python(endpoint: str, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret_token_for_the_test",
    }
    command = [sys.executable, *words]
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


def test_a_result_on_the_hub_is_verified(repo: Path, tmp_path: Path):
    quantconvert.convert(repo, tmp_path / "out")
    statement = tmp_path / "statement.json"
    with serve(tmp_path / "out") as (endpoint, _):
        done = run(endpoint, tmp_path / "cache", "verify", REPO, "--source", str(repo), "--attest", str(statement))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "as the conversion left them" in done.stdout
    subjects = {subject["name"] for subject in json.loads(statement.read_text())["subject"]}
    assert subjects == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.usefixtures("auto_equalize")
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


def test_no_network_uses_a_whole_snapshot_of_the_cache(repo: Path, tmp_path: Path):
    with serve(repo) as (endpoint, _):
        first = run(endpoint, tmp_path / "cache", REPO, str(tmp_path / "out"), "--quiet")
        planned = run(endpoint, tmp_path / "headers", "plan", REPO)
    assert (first.returncode, planned.returncode) == (0, 0), first.stderr
    again = run(endpoint, tmp_path / "cache", REPO, str(tmp_path / "again"), "--quiet")  # the server is gone
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "again")["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]
    assert f"`{COMMIT}`" in (tmp_path / "again" / "README.md").read_text()
    shard = next((tmp_path / "cache").rglob("model-00002-of-*.safetensors"))
    shard.unlink()
    for cache in ("cache", "headers"):
        done = run(endpoint, tmp_path / cache, "plan", REPO)
        assert done.returncode == 3
        assert f"`{REPO}` is no local folder, and the Hub cannot be reached: " in done.stderr
        assert "hint: check the network; what huggingface_hub's cache holds whole is used without" in done.stderr


@pytest.mark.parametrize(
    ("trouble", "sent"),
    [("whole", "`the whole file`"), ("other", r"`bytes 1-\d+/\d+`"), ("short", r"`bytes 0-\d+/\d+`")],
)
def test_an_answer_that_is_not_the_range_asked_for_is_refused(repo: Path, tmp_path: Path, trouble: str, sent: str):
    """Headers would be read from other bytes than theirs; config.json, which is asked for whole, may come whole."""
    with serve(repo, trouble) as (endpoint, _):
        done = run(endpoint, tmp_path / "cache", "plan", REPO)
    assert done.returncode == 3
    said = " ".join(done.stderr.split())
    where = r"cannot read `\S+` of `acme/tiny`: asked for bytes 0-\d+, the Hub or a proxy before it sent "
    assert re.search(where + sent, said), said
    assert ("config.json" in said) == (trouble != "whole")


@pytest.mark.parametrize(
    ("bodies", "problem"),
    [
        ([b"x" * 12, b"y" * 8], None),
        ([b"", b"x" * 12, b"", b"y" * 8], None),
        ([b"x" * 19, b"", b"", b""], "asked for bytes 29-29, the Hub or a proxy before it sent 0 bytes"),
        ([b"x" * 21] * 3, "asked for bytes 10-29, the Hub or a proxy before it sent more"),
    ],
)
def test_bodies_of_another_length(monkeypatch: pytest.MonkeyPatch, bodies: list[bytes], problem: str | None):
    """As a proxy sends them that does not correct the length: what is missing is asked for, a few times."""
    reader, left = HubReader(REPO, COMMIT, RepoFile("model.safetensors", 100)), list(bodies)

    @contextmanager
    def stream(method: str, url: str, headers: dict[str, str], **options: object) -> Iterator[SimpleNamespace]:
        said = headers["Range"].replace("=", " ") + "/100"
        body = left.pop(0)
        yield SimpleNamespace(
            status_code=206, headers={"Content-Range": said}, history=[], iter_raw=lambda: iter([body] * bool(body))
        )

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils.hf_raise_for_status", lambda answer: None)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(stream=stream))
    buffer = bytearray(20)
    if problem is None:
        reader.read_into(memoryview(buffer), 10)
        assert buffer == b"x" * 12 + b"y" * 8
        return
    with pytest.raises(quantconvert.CheckpointError) as caught:
        reader.read_into(memoryview(buffer), 10)
    assert caught.value.message.endswith(problem)


def test_a_hub_that_is_busy_is_asked_again(repo: Path, tmp_path: Path):
    """503 twice for the repository's list and for each file: the plan is the same, and nobody speaks of spelling."""
    with serve(repo, "busy") as (endpoint, _):
        done = run(endpoint, tmp_path / "cache", "plan", REPO, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_quantized"] == 14


def test_waiting_for_the_hub(monkeypatch: pytest.MonkeyPatch):
    """Longer from time to time, as long as a busy server asks for, and at once no more for what will not pass."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    class Busy(Exception):
        def __init__(self, status: int, **headers: str) -> None:
            self.response = SimpleNamespace(status_code=status, headers=headers)

    def fails(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    for error, passes, expected in (
        (Busy(503), status_of, list(WAITS)),
        (Busy(429, **{"Retry-After": "7"}), status_of, [7.0] * len(WAITS)),
        (Busy(503, **{"Retry-After": "9999"}), status_of, [60.0] * len(WAITS)),
        (Busy(404), status_of, []),
        (ConnectionError("reset"), status_of, []),
        (ConnectionError("reset"), may_pass, list(WAITS)),
        (quantconvert.CheckpointError("another range"), may_pass, []),
    ):
        waited.clear()
        with pytest.raises(type(error)):
            retried(fails(error), passes)
        assert waited == expected


def test_what_the_download_will_take(repo: Path, tmp_path: Path):
    """All of it before, none of it after."""
    script = """
import sys
from quantconvert.hub import HubRepo
repo = HubRepo("acme/tiny")
paths = tuple(sys.argv[1:])
before = repo.download(paths)
repo.prepare(paths)
print(before.nbytes, repo.download(paths).nbytes, before.folder, repo.files()[0].version.etag)
assert repo.open(paths[0]).fileno() is not None
"""
    names = sorted(path.name for path in repo.glob("model-*.safetensors"))
    with serve(repo) as (endpoint, _):
        done = run_python(endpoint, tmp_path / "cache", "-c", script, *names)
    assert done.returncode == 0, done.stderr
    total = sum((repo / name).stat().st_size for name in names)
    assert done.stdout.split() == [str(total), "0", str(tmp_path / "cache" / "hub"), "0" * 40]


def test_a_repository_for_other_processes(repo: Path, tmp_path: Path):
    """Pickled, it has no bytes of files and no signed address, and reads the same commit."""
    script = """
import pickle
from quantconvert.checkpoint import load_checkpoint
from quantconvert.hub import HubRepo
repo = HubRepo("acme/tiny")
before = load_checkpoint(repo)
text = pickle.dumps(repo)
assert load_checkpoint(pickle.loads(text)) == before
print(len(text))
"""
    with serve(repo) as (endpoint, _):
        done = run_python(endpoint, tmp_path / "cache", "-c", script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5000
