"""Executors beside the threads: one that is registered here carries out its tasks in other processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import quantconvert
from quantconvert import UsageError
from quantconvert.errors import OutputError
from quantconvert.events import Event, Note, Progress, Reporter, ShardWritten
from quantconvert.run.executors import EXECUTORS, Build, Executor
from quantconvert.run.executors.carry import carry_out_tasks
from quantconvert.run.ledger import Ledger
from tests import inputs
from tests.builders import write_checkpoint
from tests.processes import OPTIONS, ROOT, Processes
from tests.snapshots import digests


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with EXECUTORS.added(Processes()):
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, str]:
    quantconvert.convert(source, tmp_path / "whole", max_shard_size="60KB")
    return digests(tmp_path / "whole")


def test_the_same_bytes_and_events(source: Path, out: Path, whole: dict[str, str]):
    seen: list[Event] = []
    result = quantconvert.convert(source, out, report=seen.append, **OPTIONS)
    assert digests(out) == whole
    assert len([event for event in seen if isinstance(event, ShardWritten)]) == 4
    progress = sum(event.nbytes for event in seen if isinstance(event, Progress))
    assert progress == result.plan.checkpoint.nbytes


def test_continues_after_a_process_was_killed(
    source: Path, out: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Of two batches the second dies when it has written everything: the first is kept."""
    monkeypatch.setenv("DIE_AFTER", "1")
    with pytest.raises(RuntimeError, match="ended with -9") as caught:
        quantconvert.convert(source, out, **OPTIONS)
    kept = int(caught.value.__notes__[0].split()[0])
    assert kept == 11
    monkeypatch.delenv("DIE_AFTER")
    carried: list[int] = []
    run = Processes.run

    def spied(self: Processes, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
        carried.extend(tasks)
        run(self, build, tasks, ledger, report)

    monkeypatch.setattr(Processes, "run", spied)
    said: list[Event] = []
    quantconvert.convert(source, out, report=said.append, **OPTIONS)
    assert Note("resume", f"continuing: {kept} of 21 tasks are done") in said
    assert len(carried) == len(set(carried)) == 21 - kept
    assert digests(out) == whole


def test_threads_continue_what_processes_began(
    source: Path, out: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """The executor changes no byte, so it may change on the way."""
    monkeypatch.setenv("DIE_AFTER", "1")
    with pytest.raises(RuntimeError, match="ended with -9"):
        quantconvert.convert(source, out, **OPTIONS)
    quantconvert.convert(source, out, max_shard_size="60KB")
    assert digests(out) == whole


KILLED = """
import os, signal, sys, warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import quantconvert
from quantconvert.events import Progress
from quantconvert.run.executors import EXECUTORS
from tests.processes import OPTIONS, Processes
EXECUTORS.register(Processes())
Processes.batch = 6
seen = []
def die(event):
    seen.extend([event] if isinstance(event, Progress) else [])
    if len(seen) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
quantconvert.convert(sys.argv[1], sys.argv[2], report=die, equalize=False, **OPTIONS)
"""


def test_continues_after_the_whole_run_was_killed(source: Path, out: Path, whole: dict[str, str]):
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], cwd=ROOT, timeout=120)
    assert done.returncode == -9
    said: list[Event] = []
    quantconvert.convert(source, out, report=said.append, **OPTIONS)
    assert Note("resume", "continuing: 11 of 21 tasks are done") in said
    assert digests(out) == whole


@pytest.mark.usefixtures("toy_families")
@pytest.mark.parametrize("make", [inputs.fp8_model, inputs.mxfp4_model, inputs.turned_model])
def test_a_build_of_every_kind_of_input_can_be_pickled(tmp_path: Path, out: Path, make: Callable[[], inputs.Model]):
    """And carried out by the copy, in any order, with the same checksums."""
    model = make()
    source = write_checkpoint(tmp_path / "source", model.tensors, model.config)
    plan = quantconvert.plan(source, group_size=32, requantize=True)
    numbers = range(len(plan.tasks))
    found = []
    for name, order in (("forth", numbers), ("back", reversed(numbers))):
        (tmp_path / name).mkdir()
        build = Build(plan, quantconvert.checkpoint.LocalFolder(source), tmp_path / name)
        found.append(dict(carry_out_tasks(pickle.loads(pickle.dumps(build)), order)))
    assert found[0] == found[1]
    assert digests(tmp_path / "forth") == digests(tmp_path / "back")


def test_an_error_of_the_executor_is_raised_as_it_is(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(Processes):
        def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
            raise OutputError("no machine answers")

    monkeypatch.setattr(Processes, "run", Broken.run)
    with pytest.raises(OutputError, match="no machine answers"):
        quantconvert.convert(source, out, **OPTIONS)
    assert not out.exists()


def test_an_unknown_executor_is_refused_with_what_there_is(source: Path, out: Path):
    for call in (quantconvert.plan, quantconvert.convert):
        with pytest.raises(UsageError) as caught:
            call(source, out, executor="rays")
        assert caught.value.message == "--executor: unknown executor `rays`"
        assert caught.value.hint == "known executors: threads, ray, processes"
    assert not out.exists()


def test_the_executor_is_not_part_of_the_job(source: Path):
    plan = quantconvert.plan(source, executor="processes")
    assert plan.job.limits.executor == "processes"
    assert plan.digest == quantconvert.plan(source).digest


@pytest.mark.parametrize("name", ["threads", "processes"])
def test_registered_executors_know_their_name(name: str):
    executor: Executor = EXECUTORS.find(name)
    assert executor.name == name


def test_a_task_that_was_lost_is_an_error_and_not_a_result(source: Path, out: Path):
    class Careless:
        name = "careless"

        def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
            EXECUTORS["threads"].run(build, tasks[:-1], ledger, report)

    with EXECUTORS.added(Careless()), pytest.raises(OutputError, match="the executor left 1 tasks undone"):
        quantconvert.convert(source, out, executor="careless")
    assert not (out / "config.json").exists()
    quantconvert.convert(source, out)
    assert quantconvert.verify(out, source).is_ok


def test_a_task_that_was_answered_twice_counts_once(source: Path, out: Path, tmp_path: Path):
    class Twice:
        name = "twice"

        def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
            for index in (*tasks[:3], *tasks):
                for number, result in carry_out_tasks(build, [index]):
                    ledger.add(number, result)
                ledger.flush()

    with EXECUTORS.added(Twice()):
        quantconvert.convert(source, out, executor="twice")
    quantconvert.convert(source, tmp_path / "once")
    assert digests(out) == digests(tmp_path / "once")
