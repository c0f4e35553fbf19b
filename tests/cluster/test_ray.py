"""A conversion on a cluster of Ray's, of several nodes on this machine, in an environment of its own (`.ci/run`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import quantconvert
from quantconvert.events import Progress
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
