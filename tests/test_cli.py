"""The command line as a process: what it prints where, its exit codes, and how it is interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from quantconvert import __version__
from quantconvert.kernels import VARIABLE, kernel_label
from tests.builders import LLAMA_CONFIG, read_tensors, write_checkpoint
from tests.command import CLI, ENV, cli
from tests.raw_files import entry, write_raw
from tests.snapshots import snapshot

SCHEME = ["--group-size", "64", "--format", "awq"]
INTERRUPTED = "interrupted: the output folder is as it was before"


def fails(code: int, *args: object, **options: Any) -> str:
    """stderr of a command that fails with `code`, says why and prints no data and no traceback."""
    done = cli(*args, **options)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def succeeds(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    done = cli(*args, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a side file and a duplicate of its weights."""
    folder = write_checkpoint(tmp_path_factory.mktemp("cli") / "source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and the process of one `convert --json`; do not write into it."""
    folder = source.parent / "converted"
    done = succeeds("convert", source, folder.name, *SCHEME, "--json", cwd=folder.parent)
    return folder, done


# The program itself


def test_version() -> None:
    done = succeeds("--version")
    assert (done.stdout, done.stderr) == (f"quantconvert {__version__}\nkernel {kernel_label()}\n", "")


def test_a_kernel_that_is_not_known_is_refused() -> None:
    stderr = fails(2, "--version", **{VARIABLE: "fast"})
    assert stderr.startswith(f"error: {VARIABLE}: expected one of torch")
    assert "got `fast`" in stderr


@pytest.mark.parametrize("args", [["--help"], ["convert", "--help"]])
def test_help_shows_examples(args: list[str]) -> None:
    done = succeeds(*args)
    assert done.stderr == ""
    assert "Examples:" in done.stdout
    for example in ("./model out --bits 4 --group-size 128", "plan ./model --bits 4 --explain", "inspect out"):
        assert f"quantconvert {example}" in done.stdout
    assert "Exit codes:" in done.stdout


# Exit codes


def test_usage_exits_2(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fails(2, source, out, "--bits", "3") == "error: --bits: expected 4 or 8, got 3\n"
    assert fails(2, source, out, "--bit", "3") == "error: unknown option `--bit`\n\nhint: did you mean `--bits`?\n"
    missing = "error: OUT is missing\n\nhint: a folder for the result, or --push-to-hub REPO\n"
    assert fails(2, source) == missing
    usage = "hint: usage: quantconvert convert SRC [OUT] [OPTIONS]\n"
    assert fails(2, source, out, "more") == f"error: got unexpected extra argument(s) (more)\n\n{usage}"
    assert fails(2, source, out, "--workers", "x") == "error: --workers: expected a whole number, got `x`\n"
    assert fails(2, source, "") == "error: OUT is empty: expected a folder\n"
    assert not out.exists()


def test_unreadable_source_exits_3(tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = f"error: source `{tmp_path}/none` does not exist\n"
    assert fails(3, tmp_path / "none", out) == message
    assert fails(3, "plan", tmp_path / "none") == message
    assert fails(3, "inspect", tmp_path / "none") == message
    assert not out.exists()


def test_misspelled_folder_exits_3(tmp_path: Path) -> None:
    stderr = fails(3, "plan", "org/no-such-model", cwd=tmp_path)
    assert stderr.startswith("error: `org/no-such-model` is no local folder, and the Hub cannot be reached: ")
    assert stderr.endswith("\nhint: check the network; what huggingface_hub's cache holds whole is used without\n")


def test_unsupported_exits_4(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stderr = fails(4, source, out, "--group-size", "0")
    assert stderr == (
        "error: per-tensor weight-only scales load in no serving engine\n\n"
        "hint: --group-size -1 (per channel), or name the format: --format compressed-tensors\n"
    )
    assert not out.exists()


def test_second_run_exits_5(source: Path, converted: Any) -> None:
    folder, _ = converted
    before = snapshot(folder)
    stderr = fails(5, source, folder, *SCHEME)
    assert stderr == (
        f"error: output `{folder}` exists and is not empty: it holds README.md, config.json, model.safetensors ...\n\n"
        "hint: --overwrite replaces a checkpoint once the new one is complete; or choose another folder\n"
    )
    assert snapshot(folder) == before


def test_several_errors_are_printed_in_order(source: Path, tmp_path: Path) -> None:
    stderr = fails(2, source, tmp_path / "out", "--ignore", "nothing", "--format", "awq", "--bits", "8")
    assert re.fullmatch(
        r"error: --ignore `nothing` matches no tensor\n\nhint: `quantconvert plan SRC --explain` lists the names\n\n"
        r"error: awq holds 4 bits only, got 8: .* and 11 more\n\nhint: --format compressed-tensors\n",
        stderr,
    )


def test_a_usage_error_counts_before_a_folder_that_exists(source: Path, converted: Any) -> None:
    stderr = fails(2, source, converted[0], "--preset", "nonsense")
    assert stderr.startswith("error: --preset: unknown preset `nonsense`\n\nhint: known presets: ")
    assert "error: output `" in stderr


def test_errors_stand_on_stdout_for_programs(source: Path, converted: Any) -> None:
    done = cli(source, converted[0], "--preset", "nonsense", "--json")
    values = json.loads(done.stdout)
    assert (done.returncode, values["exit_code"]) == (2, 2)
    assert [(error["kind"], error["exit_code"]) for error in values["errors"]] == [("usage", 2), ("output", 5)]
    assert values["errors"][0]["hint"].startswith("known presets: ")
    assert json.loads(cli("plan", source, "--json", "--workers", "x").stdout)["exit_code"] == 2


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", ":x:", "a\\"])
def test_messages_are_no_markup(source: Path, tmp_path: Path, text: str) -> None:
    stderr = fails(2, source, tmp_path / "out", "--scheme", text)
    assert stderr.splitlines()[0] == f"error: --scheme: unknown scheme `{text}`"


# What is printed where


def test_convert_json(converted: Any, source: Path) -> None:
    folder, done = converted
    values = json.loads(done.stdout)
    assert values["format"] == "awq"
    assert values["scheme"] == "int4 g64 asymmetric"
    assert (values["source"], values["out"]) == (str(source), folder.name)
    assert (values["num_tensors"], values["num_quantized"]) == (21, 14)
    assert values["seconds"] > 0
    assert values["peak_rss_nbytes"] > 50_000_000
    assert values["kernel"] == kernel_label()
    assert values["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    assert values["dropped_files"] == ["pytorch_model.bin"]
    assert done.stderr.startswith("note left behind as duplicate weights or stale configs: pytorch_model.bin\n")
    assert "\nwrote model.safetensors, " in done.stderr
    assert done.stderr.endswith(f"done {folder.name}\n")
    assert "\x1b" not in done.stdout + done.stderr


def test_short_form_is_convert_and_quiet_is_silent(converted: Any, source: Path, tmp_path: Path) -> None:
    folder, _ = converted
    done = succeeds(source, folder.name, *SCHEME, "--quiet", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    long, short = snapshot(folder), snapshot(tmp_path / folder.name)
    assert long is not None
    assert short is not None
    assert short == long
    ours = {"quantconvert.json", "quantconvert.factors", "quantconvert.svg"}
    assert set(long) == {"README.md", "config.json", "model.safetensors", "tokenizer.json"} | ours
    assert f"\nquantconvert SRC OUT {' '.join(SCHEME)}\n" in long["README.md"].decode()


def test_plan_json(source: Path, tmp_path: Path) -> None:
    done = succeeds("plan", source, tmp_path / "out", *SCHEME, "--json")
    values = json.loads(done.stdout)
    assert done.stderr == ""
    assert len(values["tensors"]) == 21
    assert values["free_nbytes"] > values["output_nbytes"]
    assert not (tmp_path / "out").exists()


def test_plan_tells_what_convert_then_does(converted: Any, source: Path) -> None:
    folder, done = converted
    planned, did = json.loads(succeeds("plan", source, *SCHEME, "--json").stdout), json.loads(done.stdout)
    shared = planned.keys() & did.keys()
    assert {"digest", "files", "quantization_config", "total_size", "output_nbytes"} <= shared
    assert {key: planned[key] for key in shared} == {key: did[key] for key in shared}
    names = {name for tensor in planned["tensors"] for name in tensor["outputs"]}
    assert names == read_tensors(folder).keys()


def test_inspect_json(converted: Any) -> None:
    folder, _ = converted
    done = succeeds("inspect", folder, "--json")
    values = json.loads(done.stdout)
    assert done.stderr == ""
    assert values["quant_method"] == "awq"
    assert values["num_quantized_modules"] == 14
    assert values["num_tensors"] == len(read_tensors(folder))


def test_inspect_names_the_scheme(converted: Any, source: Path) -> None:
    folder, _ = converted
    assert re.search(r"quantized +awq, 14 modules *\n +scheme +int4 g64 zero points *\n", cli("inspect", folder).stdout)
    assert re.search(r"quantized +no *\n", cli("inspect", source).stdout)


def without_free(text: str) -> str:
    """A plan without what changes from moment to moment: free disk space."""
    return re.sub(r'(?m), [\d.e+]+ \w+ free *$|"free_nbytes": \d+', "", text)


@pytest.mark.parametrize("extra", [[], ["--verbose"], ["--json"]])
def test_dry_run_is_plan(source: Path, tmp_path: Path, extra: list[str]) -> None:
    out = tmp_path / "out"
    dry = succeeds(source, out, "--dry-run", *SCHEME, *extra)
    planned = succeeds("plan", source, out, *SCHEME, *extra)
    assert without_free(dry.stdout) == without_free(planned.stdout)
    assert "awq" in dry.stdout
    assert (dry.stderr, planned.stderr) == ("", "")
    assert not out.exists()


def test_explain_folds_layers(source: Path) -> None:
    """A row a kind of tensor and its reason in words; each tensor and the rule only with --verbose."""
    kinds = succeeds("plan", source, "--explain").stdout.splitlines()
    assert kinds[0].split("  ")[0] == "tensor (N = any number)"
    assert any(re.match(r"model\.layers\.N\.mlp\.down_proj\.weight +2 +BF16 +int4 g128 asymmetric", k) for k in kinds)
    assert any(line.startswith("model.embed_tokens.weight") and "looked up, not multiplied" in line for line in kinds)
    tensors = succeeds("plan", source, "--explain", "--verbose").stdout
    assert "model.layers.1.mlp.down_proj.weight" in tensors
    assert "model.layers.1.mlp.down_proj.weight" not in "".join(kinds)
    assert sum(line.startswith(("kept ", "weights ")) for line in kinds) == 1


def test_dry_run_checks_the_output(source: Path, converted: Any) -> None:
    folder, _ = converted
    assert fails(5, source, folder, "--dry-run") == fails(5, "plan", source, folder)


def test_quiet_plan_only_checks(source: Path) -> None:
    done = succeeds("plan", source, "--quiet")
    assert (done.stdout, done.stderr) == ("", "")


def test_overwrite_replaces(source: Path, tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", shards=2)
    (out / "quantize_config.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    succeeds(source, out, "--overwrite", "--scheme", "W8A16")
    files = ["README.md", "config.json", "model.safetensors", "notes.txt", "quantconvert.json", "quantconvert.svg",
             "tokenizer.json"]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == files
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"


# Planning without torch


def test_plan_and_inspect_do_not_import_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys, quantconvert\n"
        f"quantconvert.plan({str(source)!r}, {str(tmp_path / 'out')!r})\n"
        f"quantconvert.inspect({str(source)!r})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True, timeout=60)


def test_plan_command_does_not_import_torch(source: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "quantconvert", "plan", str(source)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "quantconvert.api" in imported
    assert not imported & {"torch", "numpy", "safetensors", "huggingface_hub.hf_api"}


# Terminals


def on_terminal(*args: object, columns: int = 80, **env: str) -> str:
    """stdout and stderr of a command that has a terminal for both."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([*CLI, *map(str, args)], env=ENV | env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return text.decode()


def test_colour_on_a_terminal_only(source: Path, tmp_path: Path) -> None:
    failing = (source, tmp_path / "out", "--group-size", "0")
    assert "\x1b[31merror:" in on_terminal(*failing)
    assert "\x1b" not in on_terminal(*failing, NO_COLOR="1")
    assert "\x1b" not in on_terminal("plan", source, NO_COLOR="1")
    assert "\x1b" not in fails(4, *failing)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_fits_the_terminal(source: Path, tmp_path: Path, columns: int) -> None:
    """Percent, bar, speed, time left and layers; the tensor's name only where there is room. Nothing is cut."""
    text = on_terminal(source, tmp_path / "out", columns=columns, NO_COLOR="1")
    assert text.index("equalizing 14 tensors, ") < text.index("%")
    assert text.index("%") < text.index("converting 21 tensors, ")
    bars = re.findall(r"\r *(\d+% \|[^\r]*?layers \d/2[^\r\x1b]*)", text)
    assert bars
    assert all(len(bar) <= columns for bar in bars)
    assert any(".weight" in bar for bar in bars) == (columns >= 100)
    assert "quality" in text


def test_no_color_while_converting(source: Path, tmp_path: Path) -> None:
    text = on_terminal(source, tmp_path / "out", NO_COLOR="1")
    assert "\x1b" not in text
    assert text.endswith(f"done {tmp_path / 'out'}\r\n")


# Interruption


def zeros(folder: Path, header: dict[str, Any], nbytes: int) -> Path:
    """Weights of shapes that no config.json speaks of, and embeddings."""
    write_raw(folder, header | {"model.embed_tokens.weight": entry(nbytes, nbytes + 8, [1, 4])}, nbytes + 8)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB of zeros in eight weights; the file is sparse, so that it costs no disk."""
    size = 2 * 3072 * 4096
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(8)]
    header = {name: entry(i * size, (i + 1) * size, [3072, 4096]) for i, name in enumerate(names)}
    return zeros(tmp_path_factory.mktemp("large"), header, len(names) * size)


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 GB of zeros in one weight: an interruption that is sent at once comes before it is done."""
    size = 2 * 16384 * 65536
    header = {"model.layers.0.mlp.down_proj.weight": entry(0, size, [16384, 65536])}
    return zeros(tmp_path_factory.mktemp("giant"), header, size)


def _hears_hang_ups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def interrupted(numbers: list[signal.Signals], *args: object, until: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout and lines of stderr of a conversion that gets signals once a line contains `until`."""
    process = subprocess.Popen(
        [*CLI, *map(str, args), "--workers", "1"],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hears_hang_ups,  # also where these tests run under nohup
    )
    lines: list[str] = []
    try:
        assert process.stderr
        while not lines or until not in lines[-1]:
            lines.append(process.stderr.readline().rstrip("\n"))
            assert lines[-1], "done before it could be interrupted"
        time.sleep(0.05)  # the line is out, but what wrote it may not have returned
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.005)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, stdout, [*lines, *stderr.splitlines()]


def test_sigint_before_anything_is_done_leaves_nothing(giant: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    code, stdout, lines = interrupted([signal.SIGINT], giant, out, "--no-equalize", until="converting")
    assert (code, stdout) == (130, "")
    assert lines == ["converting 2 tensors, 2.15 GB", INTERRUPTED]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_an_interrupted_run_continues(large: Path, tmp_path: Path, number: signal.Signals, expected: int) -> None:
    """With an old checkpoint in the folder, which stays whole until the new one is."""
    out = write_checkpoint(tmp_path / "out", config=LLAMA_CONFIG)
    before = snapshot(out)
    arguments = (large, out, "--overwrite", "--verbose", "--json")
    code, stdout, lines = interrupted([number], *arguments, until="layers.2")
    assert (code, stdout) == (expected, "")
    done = re.fullmatch(
        r"interrupted: (\d) of 9 tasks are done and kept: the same command continues, --restart starts over", lines[-1]
    )
    assert done
    assert int(done[1]) >= 2
    state = out / ".quantconvert"
    assert {name: value for name, value in (snapshot(out) or {}).items() if not name.startswith(state.name)} == before
    stderr = succeeds(*arguments).stderr
    assert f"\nnote continuing: {done[1]} of 9 tasks are done\nconverting 9 tensors, 201 MB\n" in f"\n{stderr}"
    assert not state.exists()


def test_a_hang_up_does_nothing_under_nohup(large: Path, tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-m", "quantconvert", str(large), str(tmp_path / "out"), "--verbose"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    lines = [process.stderr.readline()]
    while "layers.2" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_a_second_signal_kills_at_once_and_the_run_continues(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, _ = interrupted([signal.SIGINT] * 2, large, out, "--verbose", until="layers.2")
    assert code in (-signal.SIGINT, 130)
    assert not (out / "config.json").exists()
    succeeds(large, out)
    assert (out / "config.json").exists()


def test_a_closed_pipe_is_no_bug(source: Path) -> None:
    command = f"{sys.executable} -m quantconvert inspect {source} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
