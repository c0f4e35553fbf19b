"""Sources that come by ranges and results that leave shard by shard: the bytes, the faults, the room."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import fsspec
import pytest

import quantconvert
from quantconvert.checkpoint.ranges import Files
from quantconvert.run.shards import ShardWriter
from quantconvert.run.spool import Schedule
from quantconvert.run.spool.wants import Want
from quantconvert.verification.witness import Witness
from tests.builders import llama_tensors, write_checkpoint
from tests.hub_files import SOURCE
from tests.hub_writes import REPO, TOKEN, State, serve_writes
from tests.loopback import loopback
from tests.snapshots import digests

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own uploads
]
CUT: dict[str, Any] = {"max_shard_size": "700KB", "equalize": True}
# What a server may do to a range; `expired` is 403 at a signed location.
READING = ("500", "503", "429", "401", "expired", "cut", "short", "ignored", "size", "etag", "slow")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of about three megabytes."""
    tensors = llama_tensors(hidden=512, intermediate=1024)
    folder = tmp_path_factory.mktemp("source") / "in"
    folder = write_checkpoint(folder, tensors, shards=3)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Big\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.chdir(tmp_path)
    with loopback(monkeypatch, source, tmp_path / "cache") as state:
        yield state


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The result of a conversion of the downloaded source, by path."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch, loopback(patch, source, folder / "cache"):
        quantconvert.convert(SOURCE, folder / "out", stream=False, **CUT)
    return digests(folder / "out")


def shown(state: State, folder: Path) -> dict[str, str]:
    """What the Hub shows, by path."""
    for path, data in state.content().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return digests(folder)


def test_by_ranges_the_result_is_the_same(hub: State, tmp_path: Path, expected: dict[str, str]):
    quantconvert.convert(SOURCE, tmp_path / "out", stream=True, **CUT)
    assert digests(tmp_path / "out") == expected
    assert hub.files
    assert hub.files.tokens_elsewhere == 0
    assert hub.files.redirects < len(hub.files.ranges)
    assert not list(tmp_path.rglob(".source"))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))


def test_from_hub_to_hub_the_result_is_the_same(hub: State, tmp_path: Path, expected: dict[str, str]):
    result = quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    assert result.published
    assert result.published.num_sent == len(result.plan.shards) > 2
    found = shown(hub, tmp_path / "shown")
    del found[".gitattributes"]
    assert found == expected
    assert set(hub.branches) == {"main"}
    shards = {shard.file for shard in result.plan.shards}
    assert all("config.json" not in seen or shards <= seen for seen in hub.seen)
    assert hub.tokens_elsewhere == 0
    left = [path for path in tmp_path.iterdir() if path.name not in ("shown", "cache")]
    assert not left, left


@pytest.mark.parametrize("kinds", [*((kind,) for kind in READING), *combinations(READING, 2)], ids="-".join)
def test_a_source_in_trouble(
    hub: State, tmp_path: Path, expected: dict[str, str], kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    assert hub.files
    if "slow" in kinds:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.files.trouble += kinds
    quantconvert.convert(SOURCE, tmp_path / "out", stream=True, **CUT)
    assert digests(tmp_path / "out") == expected
    assert not hub.files.trouble
    assert hub.files.tokens_elsewhere == 0


@pytest.mark.parametrize("kind", ["503", "ignored", "etag"])
def test_a_source_that_stays_in_trouble(hub: State, tmp_path: Path, expected: dict[str, str], kind: str):
    """One sentence, and what is done is kept."""
    assert hub.files
    hub.files.trouble += [kind] * 1000
    with pytest.raises((quantconvert.CheckpointError, quantconvert.Refusal), match=f"`{SOURCE}`"):
        quantconvert.convert(SOURCE, tmp_path / "out", stream=True, **CUT)
    hub.files.trouble.clear()
    quantconvert.convert(SOURCE, tmp_path / "out", stream=True, **CUT)
    assert digests(tmp_path / "out") == expected


def test_the_answer_to_the_last_commit_is_lost(hub: State, tmp_path: Path, expected: dict[str, str]):
    hub.faults["lost main"] = 0
    quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    found = shown(hub, tmp_path / "shown")
    assert {path: found[path] for path in expected} == expected


@pytest.mark.parametrize("path", ["repos/create", "/branch/", "preupload", "objects/batch", "commit/quant", "refs"])
def test_a_target_in_trouble(hub: State, tmp_path: Path, expected: dict[str, str], path: str):
    hub.faults[path] = 503
    quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    found = shown(hub, tmp_path / "shown")
    assert {path: found[path] for path in expected} == expected


def test_another_machine_goes_on(hub: State, tmp_path: Path, expected: dict[str, str], monkeypatch: Any):
    """Stopped before the last commit: nothing that was sent is sent again, no byte of it is asked for again."""
    hub.faults["/commit/main"] = 403
    with pytest.raises(quantconvert.OutputError, match="does not take it"):
        quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    assert "config.json" not in hub.content()
    assert hub.files
    hub.files.ranges.clear()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    result = quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    assert result.published
    assert result.published.num_sent == 0
    found = shown(hub, tmp_path / "shown")
    assert {path: found[path] for path in expected} == expected
    puts = Counter(path for method, path in hub.log if method == "PUT")
    assert set(puts.values()) == {1}


def test_a_moved_branch_keeps_what_was_sent(hub: State):
    hub.faults["/commit/main"] = 412
    with pytest.raises(quantconvert.OutputError) as caught:
        quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    assert caught.value.hint
    assert "--create-pr" in caught.value.hint
    assert any(name.startswith("quantconvert-") for name in hub.branches)


def test_a_pull_request(hub: State):
    result = quantconvert.convert_to_hub(SOURCE, REPO, create_pr=True, **CUT)
    assert result.published
    assert result.published.url.endswith("/discussions/1")
    assert set(hub.content()) == {".gitattributes"}
    assert {shard.file for shard in result.plan.shards} <= set(hub.pulls[0])


def test_no_room(hub: State, tmp_path: Path):
    """Refused before anything is fetched, with the size that fits."""
    with pytest.raises(quantconvert.OutputError, match="too little room") as caught:
        quantconvert.convert_to_hub(SOURCE, REPO, disk_limit="4400KB", max_shard_size="1200KB", equalize=True)
    assert caught.value.hint
    assert not hub.branches
    with pytest.raises(quantconvert.OutputError, match="too small"):
        quantconvert.convert(SOURCE, tmp_path / "out", stream=False, disk_limit="4MB")


def test_the_least_room_of_a_schedule():
    """By hand: blocks of 4096 bytes; `b` is needed twice, the first and the last want share it."""
    items = [[Want("a", 0, 4096), Want("b", 0, 100)], [Want("a", 4096, 12288)], [Want("b", 0, 100)]]
    assert Schedule(items).least() == 4096 + 8192
    assert Schedule(items, punches=False).least() == 4096 + 4096 + 8192
    assert Schedule([[Want("a", 0, 0)]]).least() == 0
    overlapping = Schedule([[Want("a", 0, 10)], [Want("a", 5, 15)]])
    assert sorted(segment[1:] for segment in overlapping.segments) == [(0, 5), (5, 10), (10, 15)]


def test_never_more_than_the_limit(hub: State, tmp_path: Path, expected: dict[str, str]):
    """On a file system of exactly the promised size, where one can be had."""
    place = tmp_path / "small"
    place.mkdir()
    plan = quantconvert.plan(SOURCE)
    limit = 4_800_000
    assert limit < plan.checkpoint.nbytes
    if os.system(f"mount -t tmpfs -o size={limit} none {place} 2>/dev/null"):
        pytest.skip("needs the right to mount")
    try:
        os.chdir(place)
        quantconvert.convert_to_hub(SOURCE, REPO, disk_limit=limit, **CUT)
    finally:
        os.chdir(tmp_path)
        os.system(f"umount {place}")
    found = shown(hub, tmp_path / "shown")
    assert {path: found[path] for path in expected} == expected


SCHEMES: list[dict[str, Any]] = [
    {}, {"format": "gptq"}, {"format": "compressed-tensors"}, {"format": "rtn"}, {"format": "mlx", "group_size": 64},
    {"scheme": "W8A8"}, {"scheme": "FP8_BLOCK"}, {"scheme": "NVFP4A16"}, {"scheme": "MXFP4A16"},
    {"scheme": "W4A16:channel"},
]  # fmt: skip


@pytest.mark.parametrize("asked", SCHEMES, ids=str)
def test_a_witness_sees_each_task(hub: State, tmp_path: Path, asked: dict[str, Any]):
    """The same result and the same errors as verification at the end, of each layout and scheme."""
    quantconvert.convert(SOURCE, tmp_path / "whole", stream=False, **CUT, **asked)
    later = quantconvert.verify(tmp_path / "whole", SOURCE)
    assert later.is_ok
    result = quantconvert.convert(SOURCE, tmp_path / "out", stream=True, verify=True, **CUT, **asked)
    found = result.verification
    assert found
    assert found.num_equal == later.num_equal
    assert {e.name: e for e in found.errors} == {e.name: e for e in later.errors}
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("asked", SCHEMES[:6], ids=str)
def test_a_witness_finds_a_flipped_bit(hub: State, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]):
    """Nothing is shown, and what was sent is not taken for right by the next run."""
    see = Witness.see

    def flipped(self: Witness, index: int, theirs: Files, writer: ShardWriter) -> bool:
        output = self.plan.tasks[index].outputs[0]
        if "layers.1.mlp.up_proj" in output.name:
            fd = writer.fd(output.shard)
            (byte,) = os.pread(fd, 1, output.offset)
            os.pwrite(fd, bytes([byte ^ 64]), output.offset)
        return see(self, index, theirs, writer)

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "see", flipped)
        with pytest.raises(quantconvert.VerificationError, match=r"layers\.1\.mlp\.up_proj"):
            quantconvert.convert_to_hub(SOURCE, REPO, verify=True, **CUT, **asked)
    assert "config.json" not in hub.content()
    result = quantconvert.convert_to_hub(SOURCE, REPO, verify=True, **CUT, **asked)
    assert result.verification
    assert result.verification.is_ok
    assert {shard.file for shard in result.plan.shards} <= set(hub.content())


def test_both_sides_of_a_verification_come_by_ranges(hub: State, tmp_path: Path):
    """Nothing of the weights is kept; a changed byte on the Hub is found."""
    quantconvert.convert_to_hub(SOURCE, REPO, **CUT)
    found = quantconvert.verify(REPO, SOURCE)
    assert found.is_ok, found.findings
    assert found.num_checksums == len(hub.content()) - 2  # not of the report, and of what the Hub itself has put there
    assert len(found.errors) == 14
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.is_file()]
    statement = tmp_path / "statement.json"
    assert quantconvert.verify(REPO, SOURCE, attest=str(statement)).is_ok
    subjects = {s["name"]: s["digest"]["sha256"] for s in json.loads(statement.read_text())["subject"]}
    assert subjects == shown(hub, tmp_path / "shown")
    name = next(path for path in hub.content() if path.endswith(".safetensors"))
    data = hub.content()[name]
    data = data[:-1] + bytes([data[-1] ^ 0x40])
    oid = hub.branches["main"][name] = hashlib.sha256(data).hexdigest()
    hub.blobs[oid] = data
    again = quantconvert.verify(REPO, SOURCE)
    assert {finding.check for finding in again.findings} == {"checksums", "values"}


@pytest.fixture
def bucket(source: Path) -> Iterator[tuple[str, Any]]:
    """The source in fsspec's own memory, as another process may have put it there."""
    files = fsspec.filesystem("memory")
    for path in source.iterdir():
        files.pipe_file(f"/models/big/{path.name}", path.read_bytes())
    yield "memory://models/big", files
    files.rm("/models", recursive=True)


def test_a_bucket(bucket: tuple[str, Any], source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "local", **CUT)
    quantconvert.convert(bucket[0], tmp_path / "out", verify=True, **CUT)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    assert quantconvert.verify(tmp_path / "out", bucket[0]).is_ok
    with pytest.raises(quantconvert.CheckpointError, match="holds nothing"):
        quantconvert.plan("memory://models/other")
    with pytest.raises(quantconvert.CheckpointError, match="for Hub repositories"):
        quantconvert.plan(bucket[0], revision="main")
    with pytest.raises(quantconvert.CheckpointError, match="cannot be read"):
        quantconvert.plan("nowhere://models/other")


def test_a_bucket_in_trouble(bucket: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A short answer and a broken connection pass; a file that is changed meanwhile is refused."""
    monkeypatch.setattr("quantconvert.hub.retry.time.sleep", lambda seconds: None)
    cat, answers = bucket[1].cat_file, iter(range(1000))

    def cat_file(path: str, start: int, end: int) -> bytes:
        number = next(answers)
        if number % 5 == 1:
            raise OSError("connection reset")
        data: bytes = cat(path, start=start, end=end)
        return data[:-1] if number % 5 == 3 and len(data) > 1 else data

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket[1]), "cat_file", lambda self, path, start=None, end=None: cat_file(path, start, end))
        quantconvert.convert(bucket[0], tmp_path / "out", **CUT)
    quantconvert.convert(bucket[0], tmp_path / "again", **CUT)
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_by_xet(hub: State, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Large files go the way of hf_xet, into its own store on this disk: no request carries them, sums are the same."""
    hub.cas = tmp_path / "cas"
    hub.cas.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    result = quantconvert.convert_to_hub(SOURCE, REPO, stream=True, **CUT)
    shards = [shard.file for shard in result.plan.shards]
    assert {file: hub.branches["main"][file] for file in shards} == {file: expected[file] for file in shards}
    assert not [method for method, _ in hub.log if method == "PUT"]
    assert sum(path.stat().st_size for path in hub.cas.rglob("*") if path.is_file()) > 1_000_000


def test_a_gated_source(hub: State):
    """One sentence, at once, with what to do."""
    assert hub.files
    hub.files.gated = True
    with pytest.raises(quantconvert.Refusal, match=SOURCE) as caught:
        quantconvert.plan(SOURCE)
    assert all("hf auth login" in str(error.hint) for error in caught.value.errors)


def test_nothing_of_a_staged_shard_is_asked_for_again(hub: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On another machine, of a conversion without a first pass: headers alone."""
    options = CUT | {"equalize": False}
    hub.faults["/commit/main"] = 403
    with pytest.raises(quantconvert.OutputError):
        quantconvert.convert_to_hub(SOURCE, REPO, **options)
    assert hub.files
    hub.files.ranges.clear()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    quantconvert.convert_to_hub(SOURCE, REPO, **options)
    assert all(begin == 0 and end <= 1 << 19 for _, begin, end in hub.files.ranges)
    assert len(hub.files.ranges) == 3 + 1  # headers, and the index


def test_no_token_is_left_anywhere(hub: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Not in what is shown or staged, not in what stays here, not in an exception or an output."""
    hub.faults["/commit/main"] = 403
    events: list[Any] = []
    with pytest.raises(quantconvert.OutputError) as caught:
        quantconvert.convert_to_hub(SOURCE, REPO, report=events.append, **CUT)
    said = str(caught.value) + str(caught.value.__cause__) + str(caught.value.__notes__) + str(events)
    assert TOKEN not in said + "".join(capfd.readouterr())
    contents = [data for branch in hub.branches for data in hub.content(branch).values()]
    contents += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [data for data in contents if TOKEN.encode() in data]
    assert hub.tokens_elsewhere == 0


def test_memory(tmp_path: Path):
    """Bytes go to the disk as they come: beside huggingface_hub itself nothing is held that grows with them."""
    tensors = llama_tensors(hidden=2048, intermediate=5632)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    assert sum(path.stat().st_size for path in source.iterdir()) > 170_000_000
    peaks = {}
    with serve_writes(source) as (endpoint, _):
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        for name, words in {"headers": ("plan",), "ranges": ("convert", str(tmp_path / "out"), "--stream")}.items():
            command = [sys.executable, "-c", PEAK, words[0], SOURCE, *words[1:]]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            peaks[name] = int(done.stdout.splitlines()[-1])
    print({name: f"{peak / 1e6:.0f} MB" for name, peak in peaks.items()})
    assert peaks["ranges"] < peaks["headers"] + 100_000_000


PEAK = """
import sys
from quantconvert.cli.entry import run
try:
    run()
finally:
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), flush=True)
"""
