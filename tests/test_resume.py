"""What an interrupted run leaves and how the next one takes it up: the same command, another one, a changed source."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert import CheckpointError, OutputError
from quantconvert.events import Event, Note, Progress, ShardWritten
from quantconvert.planning import Output
from quantconvert.run.folder import OutputFolder
from quantconvert.run.ledger import Ledger
from quantconvert.run.partial import read_back
from quantconvert.run.pieces import Sums, pieces_of
from quantconvert.run.result import TaskResult
from tests import inputs
from tests.builders import llama_tensors, read_tensors, write_checkpoint
from tests.interrupted import OPTIONS, STATE, interrupt
from tests.snapshots import digests
from tests.written_through import written_through

HINT = "--restart starts over, or give the source and options of before"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, str]:
    quantconvert.convert(source, tmp_path / "whole", **OPTIONS)
    return digests(tmp_path / "whole")


def notes(call: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What a conversion says beside its result."""
    found: list[str] = []
    call(*args, report=lambda event: found.append(event.message) if isinstance(event, Note) else None, **options)
    return found


def test_the_same_call_continues(source: Path, out: Path, whole: dict[str, str]):
    interrupt(source, out)
    assert [path.name for path in out.iterdir()] == [STATE]
    assert notes(quantconvert.convert, source, out, **OPTIONS) == ["continuing: 9 of 21 tasks are done"]
    assert digests(out) == whole


def test_options_that_change_no_byte_may_change(source: Path, out: Path, whole: dict[str, str], monkeypatch):
    """Workers, memory, and how the same folder is spelled."""
    interrupt(source, out)
    monkeypatch.chdir(source.parent)
    options = OPTIONS | {"workers": 3, "memory_limit": "50MB"}
    assert notes(quantconvert.convert, source.name, "out", **options) == ["continuing: 9 of 21 tasks are done"]
    assert digests(out) == whole


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 8}, '`num_bits` was 4, is 8; `format written` was "awq", is "compressed-tensors"'),
        ({"group_size": 64}, "`group_size` was 128, is 64"),
        ({"base_model": "a/b"}, '`base_model` was null, is "a/b"'),
        ({"ignore": ("lm_head", "*.down_proj")}, '`ignore` was [], is ["lm_head", "*.down_proj"]'),
        ({"max_shard_size": "50KB"}, "`max_shard_size` was 60000, is 50000"),
    ],
    ids=lambda o: " ".join(o) if isinstance(o, dict) else "",
)
def test_another_option_is_refused_unless_told_to_restart(source: Path, out: Path, options: dict[str, Any], text: str):
    interrupt(source, out)
    before = digests(out)
    with pytest.raises(OutputError) as caught:
        quantconvert.convert(source, out, **(OPTIONS | options))
    assert caught.value.message == f"output `{out}` holds an interrupted conversion of another kind: {text}"
    assert caught.value.hint == HINT
    assert digests(out).keys() == before.keys()
    assert notes(quantconvert.convert, source, out, **OPTIONS) == ["continuing: 9 of 21 tasks are done"]
    shutil.rmtree(out)
    interrupt(source, out)
    result = quantconvert.convert(source, out, restart=True, **(OPTIONS | options))
    quantconvert.convert(source, out.parent / "fresh", **(OPTIONS | options))
    assert digests(out) == digests(out.parent / "fresh")
    assert result.out == out


def test_another_version_is_refused(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt(source, out)
    monkeypatch.setattr("quantconvert.run.folder.signature.__version__", "9.9")
    with pytest.raises(OutputError, match=rf'`quantconvert version` was "{quantconvert.__version__}", is "9.9"'):
        quantconvert.convert(source, out, **OPTIONS)


def test_other_code_of_the_same_version_is_refused(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing but the plan's digest tells."""
    interrupt(source, out)
    monkeypatch.setattr("quantconvert.planning.plan.Plan.digest", "other")
    with pytest.raises(OutputError, match=r'another kind: `plan` was "\w{64}", is "other"\n'):
        quantconvert.convert(source, out, **OPTIONS)


def touched(source: Path) -> str:
    os.utime(source / "model-00002-of-00002.safetensors", ns=(1, 1))
    return r"`mtime of model-00002-of-00002.safetensors` was \d+, is 1\n"


def grown_side_file(source: Path) -> str:
    (source / "tokenizer.json").write_text("{ }")
    return r"`size of tokenizer.json` was 2, is 3; `mtime of tokenizer.json` was \d+, is \d+\n"


def new_side_file(source: Path) -> str:
    (source / "merges.txt").write_text("x")
    return r"`size of merges.txt` was absent, is 1; `mtime of merges.txt` was absent, is \d+\n"


@pytest.mark.parametrize("change", [touched, grown_side_file, new_side_file])
def test_a_changed_source_is_refused(source: Path, out: Path, change: Callable[[Path], str]):
    interrupt(source, out)
    with pytest.raises(OutputError, match=change(source)):
        quantconvert.convert(source, out, **OPTIONS)


def test_a_source_that_vanished_for_a_while(source: Path, out: Path, whole: dict[str, str]):
    interrupt(source, out)
    path = source / "model-00002-of-00002.safetensors"
    path.rename(path.with_suffix(".away"))
    with pytest.raises(CheckpointError, match="is missing"):
        quantconvert.convert(source, out, **OPTIONS)
    path.with_suffix(".away").rename(path)
    assert notes(quantconvert.convert, source, out, **OPTIONS) == ["continuing: 9 of 21 tasks are done"]
    assert digests(out) == whole


@pytest.mark.parametrize("moment", [Note, ShardWritten])
def test_a_source_that_changes_after_the_plan_is_noticed(source: Path, out: Path, moment: type):
    """Before the first byte is read, and while it is read."""
    write_checkpoint(source, llama_tensors() | {"odd.weight": llama_tensors()["model.norm.weight"]}, shards=2)
    (source / "pytorch_model.bin").write_bytes(b"left behind, which makes a note")

    def report(event: Event) -> None:
        if isinstance(event, moment):
            os.utime(source / "model-00001-of-00002.safetensors", ns=(5, 5))

    with pytest.raises(CheckpointError, match=r"`model-00001-of-00002.safetensors` of the source changed after it was"):
        quantconvert.convert(source, out, report=report, **OPTIONS)
    assert not out.exists()


def in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x40")


def by_another_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x00\x40"
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [in_place, by_another_file])
@pytest.mark.parametrize("moment", [Note, ShardWritten])
def test_a_source_that_is_changed_with_its_time_set_back(
    source: Path, out: Path, change: Callable[[Path], None], moment: type
):
    """As `rsync --inplace -t` does: size and modification time are the old ones."""
    (source / "pytorch_model.bin").write_bytes(b"left behind, which makes a note")
    path = source / "model-00002-of-00002.safetensors"
    before = path.stat()

    def report(event: Event) -> None:
        if isinstance(event, moment):
            change(path)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(CheckpointError, match=r"of the source changed after it was planned: expected a change time of"):
        quantconvert.convert(source, out, report=report, **OPTIONS)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not out.exists()


def shards_of(out: Path) -> list[Path]:
    return sorted((out / STATE).glob("*.safetensors*"))


def spoil(out: Path) -> int:
    path = shards_of(out)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return 1


def lose_file(out: Path) -> int:
    """The first shard: every task in it but one without bytes."""
    (out / STATE / "model-00001-of-00004.safetensors").unlink()
    return 6


def cut_file(out: Path) -> int:
    os.truncate(shards_of(out)[0], 5000)
    return 6


@pytest.mark.parametrize("harm", [spoil, lose_file, cut_file])
def test_bytes_that_are_not_what_was_journalled_are_done_again(source: Path, out: Path, whole, harm):
    interrupt(source, out)
    count = harm(out)
    said = notes(quantconvert.convert, source, out, **OPTIONS)
    assert said[0] == "continuing: 9 of 21 tasks are done"
    redone, text = said[1].split(" ", 1)
    assert text == "tasks were done again: their bytes are not what the interrupted run wrote"
    assert 1 <= int(redone) <= count
    assert digests(out) == whole


@pytest.mark.parametrize(
    "harm", [b"", b'{"task": 3', b'{"task": 9999, "sha256": []}\n', b"\0" * 99, b"\xff\n", b"[]\n"]
)
def test_a_torn_journal_is_taken_up_to_the_tear(source: Path, out: Path, whole: dict[str, str], harm: bytes):
    interrupt(source, out)
    journal = out / STATE / ".journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + harm + b"".join(lines[4:] if harm else []))
    assert notes(quantconvert.convert, source, out, **OPTIONS) == ["continuing: 4 of 21 tasks are done"]
    assert digests(out) == whole


@pytest.mark.parametrize("job", [None, b"", b"{", b"[]"])
def test_a_state_that_says_nothing_is_started_over(source: Path, out: Path, whole: dict[str, str], job: bytes | None):
    """As other versions left it, or a crash."""
    (out / STATE).mkdir(parents=True)
    (out / STATE / "model-00001-of-00004.safetensors.partial").write_bytes(b"old")
    if job is not None:
        (out / STATE / ".job.json").write_bytes(job)
    said = notes(quantconvert.convert, source, out, **OPTIONS)
    assert said == [f"`{out / STATE}` holds nothing that can be continued: starting over"]
    assert digests(out) == whole


def test_torn_moves_are_no_moves(source: Path, out: Path, whole: dict[str, str]):
    interrupt(source, out)
    (out / STATE / ".moves.json").write_text('[["config.js')
    quantconvert.convert(source, out, **OPTIONS)
    assert digests(out) == whole


def test_overwrite_continues_and_the_old_checkpoint_stays(source: Path, out: Path, whole: dict[str, str]):
    quantconvert.convert(source, out, scheme="W8A16")
    before = digests(out)
    interrupt(source, out, overwrite=True)
    assert {name: value for name, value in digests(out).items() if not name.startswith(STATE)} == before
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantconvert.convert(source, out, **OPTIONS)
    assert notes(quantconvert.convert, source, out, overwrite=True, **OPTIONS) == ["continuing: 9 of 21 tasks are done"]
    assert digests(out) == whole


def finish(source: Path, out: Path, *left: str) -> None:
    """A conversion that was killed in its clean-up: of the hidden folder there is only what `left` names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "clear", lambda self: None)
        quantconvert.convert(source, out, **OPTIONS)
    for path in (out / STATE).iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sorted(path.name for path in (out / STATE).iterdir()) == sorted(left)


LEFTOVERS = [(".done.json", ".lock"), (".done.json",), (".lock",), ()]


@pytest.mark.parametrize("left", LEFTOVERS, ids=str)
def test_a_finished_run_whose_cleaning_up_was_cut_short(
    source: Path, out: Path, whole: dict[str, str], left: tuple[str, ...]
):
    """The same call, and a plan of it, sees that all is there and removes what is left, whatever that is."""
    finish(source, out, *left)
    quantconvert.plan(source, out, **OPTIONS)
    said = f"`{out}` is already complete: a run of this command ended there"
    assert notes(quantconvert.convert, source, out, **OPTIONS) == [said]
    assert digests(out) == whole


@pytest.mark.parametrize("left", LEFTOVERS, ids=str)
def test_another_conversion_is_not_taken_for_the_finished_one(
    source: Path, out: Path, whole: dict[str, str], left: tuple[str, ...]
):
    """Other options, or a source that changed since: a checkpoint is in the way, and can be overwritten."""
    finish(source, out, *left)
    for call in (quantconvert.plan, quantconvert.convert):
        with pytest.raises(OutputError, match="exists and is not empty"):
            call(source, out, bits=8)
    later = (out / "quantconvert.json").stat().st_mtime_ns + 1
    os.utime(source / "model-00002-of-00002.safetensors", ns=(later, later))
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantconvert.convert(source, out, **OPTIONS)
    quantconvert.convert(source, out, overwrite=True, bits=8, max_shard_size="60KB")
    quantconvert.convert(source, out.parent / "other", bits=8, max_shard_size="60KB")
    assert digests(out) == digests(out.parent / "other")


def test_a_finished_run_whose_files_were_changed_since(source: Path, out: Path):
    finish(source, out, ".lock")
    (out / "tokenizer.json").write_text("{ }")
    with pytest.raises(OutputError, match=r"was changed after the conversion: `tokenizer\.json`"):
        quantconvert.convert(source, out, **OPTIONS)


def test_two_at_once_are_refused(source: Path, out: Path, whole: dict[str, str]):
    """The second says who the first is, touches nothing, and the first goes on."""
    refusals: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, ShardWritten) and not refusals:
            for options in ({}, {"restart": True}, {"overwrite": True, "bits": 8}):
                with pytest.raises(OutputError) as caught:
                    quantconvert.convert(source, out, **options)
                refusals.append(caught.value.message)

    quantconvert.convert(source, out, report=report, **OPTIONS)
    assert refusals == [f"output `{out}` is being written by another conversion (process {os.getpid()})"] * 3
    assert digests(out) == whole


def test_a_file_system_without_locks(source: Path, out: Path, whole: dict[str, str], monkeypatch):
    def refuse(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (said,) = notes(quantconvert.convert, source, out, **OPTIONS)
    assert said == f"the file system of `{out}` has no locks: start no second conversion into it"
    assert digests(out) == whole


def test_checksums_of_the_result(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """Of each tensor's bytes on disk, whether this run or the interrupted one wrote them; copies have none."""
    found: dict[str, str] = {}
    add = Ledger.add

    def recorded(self: Ledger, index: int, result: TaskResult) -> None:
        add(self, index, result)
        record(self.plan.tasks[index].outputs, result.sums)

    def record(outputs: tuple[Output, ...], sums: tuple[str, ...]) -> None:
        found.update({output.name: value for output, value in zip(outputs, sums, strict=bool(sums))})

    monkeypatch.setattr(Ledger, "add", recorded)
    monkeypatch.setattr("quantconvert.planning.memory.TILE_ELEMENTS", 1 << 10)
    monkeypatch.setattr("quantconvert.planning.memory.TILE_BYTES", 1)
    monkeypatch.setattr("quantconvert.methods.rtn.Rtn.scratch", lambda self, scheme: 0)
    read_again: list[str] = []

    def spied(fd: int, output: Output, begin: int, buffer: memoryview) -> None:
        read_again.append(output.name)
        read_back(fd, output, begin, buffer)

    monkeypatch.setattr("quantconvert.run.shards.read_back", spied)
    options = OPTIONS | {"memory_limit": "40KB"}  # slabs, which are not written from first byte to last
    interrupt(source, out, **options)
    assert any(name.endswith("qweight") for name in read_again)
    result = quantconvert.convert(source, out, **options)
    tensors = read_tensors(out)
    tasks = {o.name: task for task in result.plan.quantized for o in task.outputs}
    outputs = {o.name: o for task in result.plan.quantized for o in task.outputs}
    assert found.keys() == tasks.keys()
    for name, value in found.items():
        content = bytearray(bytes(tensors[name].untyped_storage()))
        pieces = (slice(*piece) for piece in pieces_of(tasks[name], outputs[name]))
        total = sum(Sums().of(memoryview(content)[piece], piece.start) for piece in pieces)
        assert Sums().text(total) == value


def test_the_library_installs_no_signal_handlers(source: Path, out: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during: list[Any] = []

    def report(event: Event) -> None:
        during.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    quantconvert.convert(source, out, report=report)
    assert during
    assert all(handlers == before for handlers in during)


def test_a_line_is_written_only_when_its_bytes_are_synced(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker waits for each flush here, so nothing that was written may be unsynced when the journal grows."""
    for name in ("FLUSH_NBYTES", "FLUSH_SECONDS", "MAX_WAITING_NBYTES"):
        monkeypatch.setattr(f"quantconvert.run.ledger.{name}", 0)
    monkeypatch.setattr("quantconvert.run.executors.threads.POLL_SECONDS", 0.001)
    unsynced: set[str] = set()
    seen: list[set[str]] = []

    def spied(name: str, note: Callable[[str], None]) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            note(Path(f"/proc/self/fd/{args[0]}").readlink().name)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    spied("pwrite", lambda file: seen.append(set(unsynced)) if file == ".journal" else unsynced.add(file))
    spied("fdatasync", unsynced.discard)
    spied("fsync", unsynced.discard)
    (source / "tokenizer.json").unlink()
    with written_through():
        quantconvert.convert(source, out, **OPTIONS)
    assert len(seen) == 21
    assert {name for files in seen for name in files} <= {".lock"}


@pytest.mark.usefixtures("toy_families")
@pytest.mark.parametrize("make", [inputs.fp8_model, inputs.mxfp4_model, inputs.turned_model])
def test_every_kind_of_input_continues(tmp_path: Path, make: Callable[[], inputs.Model]):
    """Decoded, split and turned weights: what the interrupted run wrote is recognised, and the rest is the same."""
    model = make()
    source = write_checkpoint(tmp_path / "source", model.tensors, model.config)
    options: dict[str, Any] = {"group_size": 32, "requantize": True, "workers": 1}
    num_tasks = len(quantconvert.convert(source, tmp_path / "whole", **options).plan.tasks)
    out, names = tmp_path / "out", set()

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            names.add(event.name)
            if len(names) > num_tasks - 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantconvert.convert(source, out, report=report, **options)
    said = notes(quantconvert.convert, source, out, **options)
    assert f"continuing: {num_tasks - 1} of {num_tasks} tasks are done" in said
    assert not [text for text in said if "done again" in text]
    assert digests(out) == digests(tmp_path / "whole")
