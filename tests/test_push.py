"""Results to the Hub, through the real huggingface_hub against a server on the loopback address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantconvert
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.hub_writes import REPO, TOKEN, State, serve_writes

pytestmark = pytest.mark.process


def push(
    endpoint: str, out: Path, *words: str, repo: str = REPO, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    return run(endpoint, out.parent, "push", str(out), repo, *words, token=token)


def run(endpoint: str, work: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "quantconvert", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    return done


def test_convert_and_push_in_one_command(tmp_path: Path):
    source, out = write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG), tmp_path / "out"
    with serve_writes() as (endpoint, state):
        done = run(endpoint, tmp_path, "convert", str(source), str(out), "--group-size", "32", "--push-to-hub", REPO)
        assert done.returncode == 0, done.stderr
        check_shown(state, out)
        wrong = run(endpoint, tmp_path, "convert", str(source), str(tmp_path / "b"), "--push-to-hub", "alone")
        assert wrong.returncode == 2
        assert not (tmp_path / "b").exists()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A result in several shards."""
    source = write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG)
    quantconvert.convert(source, tmp_path / "out", group_size=32, max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    return tmp_path / "out"


def local(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def check_shown(state: State, out: Path) -> None:
    """All of it, nothing else; and main never had a config without every shard."""
    content = {path: data for path, data in state.content().items() if path != ".gitattributes"}
    assert content == local(out)
    shards = {path.name for path in out.glob("*.safetensors")}
    assert all("config.json" not in seen or shards <= seen for seen in state.seen)
    assert state.tokens_elsewhere == 0
    assert set(state.branches) == {"main"}


def test_all_of_it_in_one_commit(out: Path):
    with serve_writes() as (endpoint, state):
        done = push(endpoint, out, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["repo_id"], told["commit"]) == (REPO, state.heads["main"])
        check_shown(state, out)
        assert sum(path.endswith("/commit/main") for _, path in state.log) == 1
        again = push(endpoint, out)
        assert again.returncode == 0, again.stderr
        check_shown(state, out)


@pytest.mark.parametrize(
    "path", ["repos/create", "/branch/", "preupload", "objects/batch", "commit/quant", "commit/main"]
)
@pytest.mark.parametrize("status", [503, 429])
def test_a_server_in_trouble_is_asked_again(out: Path, path: str, status: int):
    with serve_writes() as (endpoint, state):
        state.faults[path] = status
        done = push(endpoint, out)
        assert done.returncode == 0, done.stderr
        check_shown(state, out)


def test_the_same_command_sends_only_what_is_missing(out: Path, tmp_path: Path):
    """A run that ended after a shard: another machine, which has the result too, goes on from the staging branch."""
    with serve_writes() as (endpoint, state):
        state.faults["/commit/main"] = 403
        first = push(endpoint, out)
        assert first.returncode == 5
        assert "may not write" in first.stderr
        assert "config.json" not in state.content()
        puts = sum(method == "PUT" for method, _ in state.log)
        second = push(endpoint, out)
        assert second.returncode == 0, second.stderr
        shards = len(list(out.glob("*.safetensors")))
        assert puts >= shards
        sent = [path for method, path in state.log if method == "PUT"]
        assert len(sent) == len(set(sent))
        check_shown(state, out)


def test_an_older_result_is_replaced(out: Path, tmp_path: Path):
    with serve_writes() as (endpoint, state):
        assert push(endpoint, out).returncode == 0
        state.branches["main"]["notes.txt"] = b"mine"
        source = tmp_path / "in"
        quantconvert.convert(source, tmp_path / "new", group_size=64, format="gptq")
        done = push(endpoint, tmp_path / "new")
        assert done.returncode == 0, done.stderr
        content = state.content()
        assert content.pop("notes.txt") == b"mine"
        assert {path: data for path, data in content.items() if path != ".gitattributes"} == local(tmp_path / "new")


def test_a_branch_that_moved_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch):
    with serve_writes() as (endpoint, state):
        assert push(endpoint, out).returncode == 0
        state.faults["/commit/main"] = 412
        state.branches["main"]["config.json"] = b"{}"  # somebody's
        done = push(endpoint, out)
        assert done.returncode == 5
        assert "has moved since this run began" in done.stderr
        assert "--create-pr" in done.stderr


def test_a_pull_request_leaves_main_as_it_is(out: Path):
    with serve_writes() as (endpoint, state):
        done = push(endpoint, out, "--create-pr", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["url"].endswith("/discussions/1")
        assert set(state.content()) == {".gitattributes"}
        assert {path for path in state.pulls[0] if path != ".gitattributes"} == set(local(out))


def test_refusals(out: Path, tmp_path: Path):
    with serve_writes() as (endpoint, state):
        wrong = push(endpoint, out, token="hf_other")
        assert wrong.returncode == 5
        assert "hf auth login" in wrong.stderr
        assert push(endpoint, out, repo="alone").returncode == 2
        assert "no repository to write to" in push(endpoint, out, repo="alone").stderr
        with open(next(out.glob("*.safetensors")), "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        broken = push(endpoint, out)
        assert broken.returncode == 6
        (out / "quantconvert.json").unlink()
        assert push(endpoint, out).returncode == 6
        assert not state.branches
