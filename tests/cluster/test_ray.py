"""A conversion on a cluster of Ray's, of several nodes on this machine, in an environment of its own (`.ci/run`)."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.events import Progress
from quantconvert.run.executors import Build
from quantconvert.run.executors.order import Order
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.snapshots import digests

ray = pytest.importorskip("ray", reason="of an environment of its own: .ci/run")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]
CUT: dict[str, Any] = {"max_shard_size": "300KB"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores and two nodes of one core each."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(ROOT))
    found = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found.nodes = [found.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantconvert.run.executors.cluster.BATCH_NBYTES", 400_000)
    monkeypatch.setattr("quantconvert.run.executors.cluster.PROCESS_NBYTES", 1_000_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors(hidden=512, intermediate=1024)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "in", tensors, shards=2)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    quantconvert.convert(source, out, **CUT)
    return digests(out)


@pytest.mark.parametrize("equalize", [False, True])
def test_the_same_bytes(cluster: Any, source: Path, tmp_path: Path, equalize: bool):
    quantconvert.convert(source, tmp_path / "local", equalize=equalize, **CUT)
    quantconvert.convert(source, tmp_path / "out", equalize=equalize, executor="ray", verify=True, **CUT)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_names_from_where_the_driver_stands(
    cluster: Any, source: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Workers stand elsewhere."""
    (tmp_path / "in").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    quantconvert.convert("in", "out", executor="ray", **CUT)
    assert digests(tmp_path / "out") == expected


def workers() -> list[int]:
    """Processes of the cluster that carry out batches."""
    found = subprocess.run(["pgrep", "-f", "ray::carry_out_batch"], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def test_a_worker_is_killed(cluster: Any, source: Path, tmp_path: Path, expected: dict[str, str]):
    killed, done = list[int](), threading.Event()

    def kill() -> None:
        while not killed and not done.is_set():
            for pid in workers()[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    hunter = threading.Thread(target=kill)
    hunter.start()
    quantconvert.convert(source, tmp_path / "out", executor="ray", **CUT)
    done.set()
    hunter.join()
    assert killed
    assert digests(tmp_path / "out") == expected


def test_a_driver_that_is_stopped(cluster: Any, source: Path, tmp_path: Path, expected: dict[str, str]):
    """And the reverse: what the threads began the cluster finishes."""
    for first, then in (("ray", "threads"), ("threads", "ray")):
        out, count = tmp_path / first, 0

        def stop(event: object) -> None:
            nonlocal count
            count += isinstance(event, Progress)
            if count > 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantconvert.convert(source, out, executor=first, report=stop, **CUT)
        quantconvert.convert(source, out, executor=then, **CUT)
        assert digests(out) == expected


def test_the_driver_dies(cluster: Any, source: Path, tmp_path: Path, expected: dict[str, str]):
    """By SIGKILL, while its workers still write: the same bytes to the same places."""
    script = f"""
import os, signal, sys
import quantconvert
from quantconvert.events import Progress
from quantconvert.run.executors import cluster
cluster.BATCH_NBYTES, cluster.PROCESS_NBYTES = 400_000, 1_000_000
def report(event):
    if isinstance(event, Progress):
        os.kill(os.getpid(), signal.SIGKILL)
quantconvert.convert({str(source)!r}, {str(tmp_path / "out")!r}, executor="ray", report=report, max_shard_size="300KB")
"""
    env = os.environ | {"RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    quantconvert.convert(source, tmp_path / "out", **CUT)
    assert digests(tmp_path / "out") == expected


def test_bad_data_fails_once(cluster: Any, tmp_path: Path):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG)
    with pytest.raises(quantconvert.CheckpointError, match=r"layers\.1\.mlp\.up_proj") as caught:
        quantconvert.convert(source, tmp_path / "out", group_size=32, executor="ray")
    assert "--nan-policy keep" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_the_source_changes(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the driver's plan and a worker's: refused in our words, by the first that looks."""
    source = write_checkpoint(tmp_path / "in", llama_tensors(hidden=512, intermediate=1024), shards=2)
    give = Order.give

    def change_then_give(build: Build) -> Order:
        write_checkpoint(source, llama_tensors(hidden=512, intermediate=512), shards=2)
        return give(build)

    monkeypatch.setattr(Order, "give", change_then_give)
    with pytest.raises(quantconvert.CheckpointError, match="plans another result from") as caught:
        quantconvert.convert(source, tmp_path / "out", executor="ray", **CUT)
    assert caught.value.exit_code == 3
    assert "the same source on all machines" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("forged", "kind", "words"),
    [
        ({"digest": "0" * 64}, quantconvert.CheckpointError, r"\(digest 000000000000\)"),
        ({"version": "0.0.1"}, quantconvert.UnsupportedError, "expected 0.0.1"),
        ({"run": "other"}, quantconvert.OutputError, "of another run"),
    ],
)
def test_another_order_is_refused(
    cluster: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: Any, kind: Any, words: str
):
    give = Order.give
    monkeypatch.setattr(Order, "give", lambda build: replace(give(build), **forged))
    with pytest.raises(kind, match=words):
        quantconvert.convert(source, tmp_path / "out", executor="ray", **CUT)
    assert not (tmp_path / "out").exists()


def test_a_refused_order_loses_nothing(
    cluster: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
):
    def stop(event: object) -> None:
        seen.append(event)
        if sum(isinstance(event, Progress) for event in seen) > 8:
            raise KeyboardInterrupt

    seen, give, out = list[object](), Order.give, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantconvert.convert(source, out, executor="ray", report=stop, **CUT)
    with monkeypatch.context() as forging:
        forging.setattr(Order, "give", lambda build: replace(give(build), digest="0" * 64))
        with pytest.raises(quantconvert.CheckpointError) as caught:
            quantconvert.convert(source, out, executor="ray", **CUT)
    assert "done and kept" in caught.value.__notes__[0]
    quantconvert.convert(source, out, executor="ray", **CUT)
    assert digests(out) == expected


def test_what_travels_is_small(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a plan of three thousand tensors the arguments of a task hold options and numbers."""
    sent = list[int]()
    remote = ray.remote

    def measured(**how: Any) -> Any:
        def of(function: Any) -> Any:
            task = remote(**how)(function)

            def send(*arguments: Any) -> Any:
                sent.append(len(pickle.dumps(arguments)))
                return task.remote(*arguments)

            return SimpleNamespace(remote=send)

        return of

    monkeypatch.setattr("quantconvert.run.executors.cluster.BATCH_NBYTES", 10**9)
    monkeypatch.setattr(ray, "remote", measured)
    source = write_checkpoint(tmp_path / "in", llama_tensors(hidden=32, intermediate=32, layers=340, kv=32))
    result = quantconvert.convert(source, tmp_path / "out", group_size=32, equalize=False, executor="ray")
    assert len(result.plan.tasks) > 3000
    assert len(pickle.dumps(result.plan)) > 1_000_000
    assert len(sent) > 3
    assert max(sent) < 20_000


def test_what_the_driver_found_reaches_its_workers(cluster: Any, tmp_path: Path):
    """NaN that is kept, and the rules of --target-bits: neither is in a header."""
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors, LLAMA_CONFIG)
    how: dict[str, Any] = {"group_size": 32, "nan_policy": "keep", "target_bits": 6.0}
    for name, executor in (("local", "threads"), ("out", "ray")):
        quantconvert.convert(source, tmp_path / name, executor=executor, **how)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_a_node_is_lost(cluster: Any, source: Path, tmp_path: Path, expected: dict[str, str]):
    """Last, as the cluster has one node less then."""
    removed = threading.Event()

    def remove(event: object) -> None:
        if isinstance(event, Progress) and not removed.is_set():
            removed.set()
            cluster.remove_node(cluster.nodes[0], allow_graceful=False)

    quantconvert.convert(source, tmp_path / "out", executor="ray", report=remove, **CUT)
    assert removed.is_set()
    assert digests(tmp_path / "out") == expected
