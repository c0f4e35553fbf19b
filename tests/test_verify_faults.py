"""What is wrong with a converted checkpoint is found, and by its name: flipped bits, changed values, other configs."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantconvert
from quantconvert.kernels import VARIABLE
from quantconvert.layouts import LAYOUTS as REGISTERED
from quantconvert.methods import rounding as rtn
from quantconvert.verification import Verification
from tests.builders import LLAMA_CONFIG, decode, llama_tensors, read_tensors, write_checkpoint
from tests.command import cli
from tests.interrupted import interrupt
from tests.snapshots import digests

CONFIG = LLAMA_CONFIG | {"num_hidden_layers": 1}
INDEX, REPORT = "model.safetensors.index.json", "quantconvert.json"
UP, DOWN, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.norm.weight"
LAYOUTS: dict[str, dict[str, Any]] = {
    "awq": {"format": "awq", "group_size": 64},
    "gptq": {"format": "gptq", "group_size": 64},
    "gptq asymmetric": {"format": "gptq", "group_size": 64, "symmetric": False},
    "gptq int8": {"format": "gptq", "bits": 8, "group_size": -1},
    "compressed-tensors": {"format": "compressed-tensors", "group_size": 64},
    "compressed-tensors asymmetric": {"format": "compressed-tensors", "group_size": 64, "symmetric": False},
    "W8A8": {"format": "compressed-tensors", "scheme": "W8A8"},
    "rtn": {"format": "rtn", "group_size": 64},
    "rtn int8 asymmetric": {"format": "rtn", "bits": 8, "symmetric": False, "group_size": 64},
}
every_layout = pytest.mark.parametrize("kind", LAYOUTS)
# One code, and one zero point, by the last part of their tensors' names.
CODES = ("qweight", "weight_packed", "weight")
ZEROS = ("qzeros", "weight_zero_point")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("faults") / "source", llama_tensors(layers=1), CONFIG)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    return folder


@pytest.fixture(scope="module")
def results(source: Path) -> Callable[..., Path]:
    """The converted folder of a layout; with `sharded` in several files. Made once; copy it before writing."""

    def make(kind: str, sharded: bool = False) -> Path:
        out = source.parent / f"{kind} {sharded}".replace(" ", "-")
        if not out.exists():
            quantconvert.convert(source, out, max_shard_size="40KB" if sharded else "5GB", **LAYOUTS[kind])
        return out

    return make


@pytest.fixture
def copy(results: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda *args: shutil.copytree(results(*args), tmp_path / "copy", dirs_exist_ok=True)


def named(found: Verification) -> set[tuple[str, str]]:
    return {(finding.check, finding.where) for finding in found.findings}


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


# Bits


def regions(out: Path) -> dict[str, tuple[str, int, int]]:
    """A stretch of bytes of every kind: file, first byte, last byte."""
    first = min(out.glob("*.safetensors")).name
    length = int.from_bytes((out / first).read_bytes()[:8], "little")
    found = {"header length": (first, 0, 8), "header": (first, 8, 8 + length)}
    for path in sorted(out.glob("*.safetensors")):
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for name, entry in header(path).items():
            last = name.rpartition(".")[2]
            if name != "__metadata__" and (name.startswith(UP) or name == NORM):
                low, high = entry["data_offsets"]
                found[last if name.startswith(UP) else "copied"] = (path.name, begin + low, begin + high)
    for name in (INDEX, "config.json", "tokenizer.json", "README.md", REPORT):
        found[name] = (name, 0, (out / name).stat().st_size)
    return found


@pytest.mark.parametrize("kind", ["awq", "gptq", "compressed-tensors asymmetric", "rtn int8 asymmetric"])
def test_every_flipped_bit_is_found(kind: str, copy: Callable[..., Path]):
    out = copy(kind, True)
    assert quantconvert.verify(out).is_ok
    places, dice = regions(out), random.Random(7)
    assert len(places) >= 11
    for region, (name, begin, end) in places.items():
        original = (out / name).read_bytes()
        for _ in range(4):
            at, bit = dice.randrange(begin, end), dice.randrange(8)
            changed = bytearray(original)
            changed[at] ^= 1 << bit
            (out / name).write_bytes(changed)
            found = quantconvert.verify(out)
            assert ("checksums", name) in named(found), (region, at, bit, found.findings)
            assert {where for check, where in named(found) if check == "checksums"} == {name}, (region, at, bit)
        (out / name).write_bytes(original)
    assert quantconvert.verify(out).is_ok


def test_checksums_are_those_of_hashlib_and_name_every_file(results: Callable[..., Path]):
    out = results("awq", True)
    report = json.loads((out / REPORT).read_bytes())
    assert report["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.name != REPORT
    }
    text = (out / REPORT).read_text().replace(f'  "sha256": "{report["sha256"]}"\n', "").replace("  },\n}", "  }\n}")
    assert report["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", INDEX, "config.json"])
def test_a_missing_file_is_found(name: str, copy: Callable[..., Path]):
    out = copy("awq", True)
    (out / name).unlink()
    assert ("checksums", name) in named(quantconvert.verify(out))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"files": []}', b"\xff", b"[" * 100_000, b'{"files": {"../x": 1}}'], ids=repr
)
def test_a_report_that_is_none(content: bytes, copy: Callable[..., Path]):
    out = copy("awq")
    (out / REPORT).write_bytes(content)
    assert named(quantconvert.verify(out)) == {("checksums", REPORT)}


# Values, without the report


def change(out: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a folder of one file, and remove the report."""
    (out / REPORT).unlink(missing_ok=True)
    tensors = read_tensors(out)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})


def part(tensors: dict[str, Tensor], module: str, suffixes: tuple[str, ...]) -> Tensor:
    return next(tensors[f"{module}.{suffix}"] for suffix in suffixes if f"{module}.{suffix}" in tensors)


@every_layout
@pytest.mark.parametrize("seed", range(3))
def test_one_code_by_one_step(kind: str, seed: int, copy: Callable[..., Path], source: Path):
    """The lowest bit of some code: the only way to be wrong by one step in one value."""
    out, dice = copy(kind), random.Random(seed)
    bits = 8 if "8" in kind else 4

    def edit(tensors: dict[str, Tensor]) -> None:
        raw = part(tensors, UP, CODES).view(torch.uint8).view(-1)
        raw[dice.randrange(raw.numel())] ^= 1 << (bits * dice.randrange(8 // bits))

    change(out, edit)
    assert quantconvert.verify(out, method="rtn").is_ok, "without the source a code is as good as another"
    assert named(quantconvert.verify(out, source, method="rtn")) == {("values", UP)}


@every_layout
def test_one_scale_by_a_few_per_cent(kind: str, copy: Callable[..., Path], source: Path):
    out = copy(kind)
    change(out, lambda tensors: part(tensors, UP, ("scales", "weight_scale")).view(-1)[3:4].mul_(1.05))
    assert named(quantconvert.verify(out, source, method="rtn")) == {("values", UP)}


@pytest.mark.parametrize("kind", ["awq", "gptq asymmetric", "compressed-tensors asymmetric", "rtn int8 asymmetric"])
def test_one_zero_point_by_one(kind: str, copy: Callable[..., Path], source: Path):
    out = copy(kind)
    change(out, lambda tensors: part(tensors, UP, ZEROS).view(torch.uint8).view(-1)[5:6].bitwise_xor_(1))
    assert named(quantconvert.verify(out, source, method="rtn")) == {("values", UP)}


@every_layout
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -0.01])
def test_a_scale_that_is_none_needs_no_source(kind: str, value: float, copy: Callable[..., Path], source: Path):
    out = copy(kind)
    change(out, lambda tensors: part(tensors, UP, ("scales", "weight_scale")).view(-1)[3:4].fill_(value))
    for found in (quantconvert.verify(out, method="rtn"), quantconvert.verify(out, source, method="rtn")):
        assert named(found) == {("codes", UP)}
        assert found.failed == "codes"
        json.dumps(found.to_json(), allow_nan=False)


EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, str]]] = {
    "copied": (lambda t: t[NORM][7:8].add_(0.5), ("values", NORM)),
    "missing copied": (lambda t: t.pop(NORM), ("values", NORM)),
    "missing weight": (lambda t: [t.pop(n) for n in list(t) if n.startswith(UP)], ("values", f"{UP}.weight")),
    "extra": (lambda t: t.update({"model.extra": torch.ones(3)}), ("values", "model.extra")),
    "shape": (lambda t: t.update({NORM: t[NORM][:-1]}), ("values", NORM)),
    "dtype": (lambda t: t.update({NORM: t[NORM].float()}), ("values", NORM)),
    "swapped": (
        lambda t: t.update({n: t[n.replace("gate", "up")].clone() for n in t if "gate_proj" in n}),
        ("values", UP.replace("up", "gate")),
    ),
    "plain": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(UP)] + [t.update({f"{UP}.weight": torch.ones(256, 128)})],
        ("values", f"{UP}.weight"),
    ),
}


@pytest.mark.parametrize("kind", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("edit", EDITS)
def test_other_tensors_are_named(edit: str, kind: str, copy: Callable[..., Path], source: Path):
    out, (work, expected) = copy(kind), EDITS[edit]
    change(out, work)
    assert expected in named(quantconvert.verify(out, source, method="rtn"))
    assert {where for check, where in named(quantconvert.verify(out, source, method="rtn")) if check == "values"} == {
        expected[1]
    }


@every_layout
@pytest.mark.parametrize("suffixes", [CODES, ("scales", "weight_scale")])
def test_a_part_of_a_weight_that_is_missing_or_misshapen(
    kind: str, suffixes: tuple[str, ...], copy: Callable[..., Path], source: Path
):
    out = copy(kind)
    names = [f"{DOWN}.{suffix}" for suffix in suffixes]
    change(out, lambda t: t.update({name: t[name][:-1] for name in names if name in t}))
    # rows of int4 in pairs: without the source, one scale less may be one row less
    alone = [] if kind == "rtn" and suffixes != CODES else [quantconvert.verify(out, method="rtn")]
    for found in (*alone, quantconvert.verify(out, source, method="rtn")):
        assert any(DOWN in finding.message + finding.where for finding in found.findings)
    change(out, lambda t: [t.pop(name, None) for name in names])
    found = quantconvert.verify(out, source, method="rtn")
    assert any(DOWN in finding.message + finding.where for finding in found.findings)


# Errors of each weight


@every_layout
def test_errors_are_those_of_float64(kind: str, results: Callable[..., Path], source: Path):
    out = results(kind)
    stored, original = read_tensors(out), read_tensors(source)
    stored = {k: t.double() if k.endswith(("scales", "weight_scale")) else t for k, t in stored.items()}
    report = json.loads((out / REPORT).read_bytes())["tensors"]
    found = quantconvert.verify(out, source, method="rtn")
    assert len(found.errors) == len(report) == 7
    bits, layout = 8 if "8" in kind else 4, LAYOUTS[kind]["format"]
    for error in found.errors:
        module = error.name.removesuffix(".weight")
        w = original[error.name].double()
        noise = decode(stored, module, layout, bits, "asymmetric" not in kind) - w
        assert error.relative_error == pytest.approx(float(noise.norm() / w.norm()), rel=1e-5)
        assert error.sqnr == pytest.approx(-20 * float(torch.log10(noise.norm() / w.norm())), abs=0.006)
        assert 0.4 < error.max_error < 2
        assert report[error.name]["scheme"] == error.scheme
        assert report[error.name]["relative_error"] == pytest.approx(error.relative_error, rel=1e-5)
        assert report[error.name]["sqnr"] == pytest.approx(error.sqnr, abs=0.011)


def test_a_verified_report_is_the_same_and_its_errors_are_those_of_verify(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "out", verify=True)
    report = json.loads((tmp_path / "out" / REPORT).read_bytes())
    quantconvert.convert(source, tmp_path / "plain")
    assert (tmp_path / "plain" / REPORT).read_bytes() == (tmp_path / "out" / REPORT).read_bytes()
    errors = {error.name: error for error in quantconvert.verify(tmp_path / "out", source).errors}
    assert report["tensors"].keys() == errors.keys()
    for name, tensor in report["tensors"].items():
        assert tensor["relative_error"] == pytest.approx(errors[name].relative_error, rel=1e-4)
        assert tensor["sqnr"] == pytest.approx(errors[name].sqnr, abs=0.02)
    assert report["source"]["files"] == {path.name: path.stat().st_size for path in source.glob("*.safetensors")}


def test_the_report_is_the_same_however_it_was_made(tmp_path: Path):
    source = write_checkpoint(tmp_path / "somewhere" / "source", shards=2)
    options: dict[str, Any] = {"workers": 1, "max_shard_size": "60KB"}
    quantconvert.convert(source, tmp_path / "a", **options)
    quantconvert.convert(source, tmp_path / "b", **(options | {"workers": 3, "memory_limit": "40MB"}))
    interrupt(source, tmp_path / "c")
    quantconvert.convert(source, tmp_path / "c", **options)
    shutil.copytree(source, tmp_path / "elsewhere" / "source")
    quantconvert.convert(tmp_path / "elsewhere" / "source", tmp_path / "d", **options)
    report = (tmp_path / "a" / REPORT).read_bytes()
    for name in "bcd":
        assert (tmp_path / name / REPORT).read_bytes() == report
        assert digests(tmp_path / name) == digests(tmp_path / "a")
    import socket
    import time

    text = report.decode()
    for word in (str(tmp_path), "somewhere", socket.gethostname(), time.strftime("%Y-%m"), str(int(time.time()))[:6]):
        assert word not in text.replace(json.loads(text)["sha256"], "")
    quantconvert.convert(source, tmp_path / "e", verify=True, **options)
    quantconvert.convert(source, tmp_path / "f", verify=True, **(options | {"workers": 3, "memory_limit": "40MB"}))
    assert digests(tmp_path / "e") == digests(tmp_path / "f")


# A conversion that goes wrong


@pytest.mark.parametrize("kind", ["awq", "W8A8", "rtn"])
def test_wrong_bytes_never_appear(kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout = type(REGISTERED.find(LAYOUTS[kind]["format"]))
    encode = layout.encode

    def wrong(self: Any, quantized: Any, scheme: Any, shape: tuple[int, ...]) -> Any:
        if shape == (128, 256):
            quantized.codes[5, 9] = quantized.codes[5, 9] ^ 1
        return encode(self, quantized, scheme, shape)

    monkeypatch.setattr(layout, "encode", wrong)
    monkeypatch.setenv(VARIABLE, "torch")
    with pytest.raises(quantconvert.VerificationError) as caught:
        quantconvert.convert(source, tmp_path / "out", verify=True, **LAYOUTS[kind])
    assert caught.value.exit_code == 6
    assert f"values: `{DOWN}` a code is " in caught.value.message
    assert "failed at values, 1 findings" in caught.value.message
    assert not (tmp_path / "out").exists()
    quantconvert.convert(source, tmp_path / "out", **LAYOUTS[kind])  # unasked, it is not noticed
    assert not quantconvert.verify(tmp_path / "out", source).is_ok


def test_wrong_scales_do_not_replace_a_checkpoint(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    quantconvert.convert(source, out)
    before = digests(out)
    qparams = rtn.qparams
    monkeypatch.setattr(rtn, "qparams", lambda *args: (qparams(*args)[0] * 0.8, qparams(*args)[1]))
    monkeypatch.setenv(VARIABLE, "torch")
    with pytest.raises(quantconvert.VerificationError, match="failed at values, 7 findings"):
        quantconvert.convert(source, out, verify=True, overwrite=True)
    assert digests(out) == before


# The command line


@pytest.mark.process
def test_command_line(copy: Callable[..., Path], source: Path, tmp_path: Path):
    out = copy("awq")
    done = cli("verify", out, "--source", source, "--json")
    assert (done.returncode, done.stderr) == (0, "checking 12 tensors, 113 kB\n")
    value = json.loads(done.stdout)
    assert (value["ok"], value["failed"], value["findings"], len(value["errors"])) == (True, None, [], 7)
    assert value == quantconvert.verify(out, source, method="rtn").to_json()
    (out / "tokenizer.json").write_text("{}")
    change(out, lambda tensors: tensors[NORM][7:8].add_(0.5))
    done = cli("verify", out, "--source", source, "--json")
    assert done.returncode == 6
    value = json.loads(done.stdout)
    assert (value["ok"], value["failed"], [f["where"] for f in value["findings"]]) == (False, "values", [NORM])
    done = cli("verify", out, "--source", source, "--quiet")
    assert (done.returncode, "Traceback" in done.stdout) == (6, False)
    assert done.stderr == f"values: {NORM}: differs from the source, which it should equal\n"
    done = cli("verify", tmp_path / "none", "--json")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (3, 3)
    assert done.stderr.startswith("error: ")
    with pytest.raises(quantconvert.CheckpointError):
        quantconvert.verify(out, tmp_path / "none")
