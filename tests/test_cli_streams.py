"""The command line where the world is unkind: closed and full streams, signals while modules are imported, typos."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import write_checkpoint
from tests.command import CLI, ENV, cli
from tests.snapshots import snapshot

pytestmark = pytest.mark.process
SHELL = " ".join(CLI)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("streams") / "source")


def shell(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["bash", "-c", script], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


# Streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_bug(source: Path, tmp_path: Path, closed: str) -> None:
    """A file of ours never gets a closed stream's number: the result is that of any other run."""
    assert shell(f"{SHELL} plan {source} {closed}", tmp_path).returncode == 0
    assert shell(f"{SHELL} plan {tmp_path}/none {closed}", tmp_path).returncode == 3
    assert shell(f"{SHELL} {source} out {closed}", tmp_path).returncode == 0
    assert shell(f"{SHELL} {source} other", tmp_path).returncode == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "other")


@pytest.mark.parametrize("words", ["plan SRC --json", "plan SRC", "inspect SRC", "--help", "plan --help", "--version"])
def test_a_full_disk_behind_stdout(source: Path, tmp_path: Path, words: str) -> None:
    done = shell(f"{SHELL} {words.replace('SRC', str(source))} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (5, "error: cannot write to stdout: No space left on device\n")


def test_a_full_disk_behind_stderr_stops_nothing(source: Path, tmp_path: Path) -> None:
    assert shell(f"{SHELL} {source} out --verbose 2> /dev/full", tmp_path).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert shell(f"{SHELL} plan {tmp_path}/none 2> /dev/full", tmp_path).returncode == 3


def test_whoever_read_stdout_is_gone(source: Path, tmp_path: Path) -> None:
    done = shell(f"{SHELL} --help | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode in (0, 141)
    assert shell(f"(sleep 0; {SHELL} plan {source} --json; echo $? >&2) | true", tmp_path).stderr in ("0\n", "141\n")


# Signals


# The program, which sends itself a signal once it looks for a module.
CHILD = """
import os, sys
module, number = sys.argv[1], int(sys.argv[2])
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
sys.argv[:3] = ["quantconvert"]
from quantconvert.cli.entry import run
run()
"""


def interrupted_while_importing(
    module: str, number: signal.Signals, *words: object, kernel: str = "auto"
) -> tuple[int, str]:
    """Exit code and stderr of a run that gets a signal when the import of `module` begins."""
    command = [sys.executable, "-c", CHILD, module, str(int(number)), *map(str, words)]
    env = {**ENV, "QUANTCONVERT_KERNEL": kernel}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "module", ["quantconvert.cli.words", "quantconvert.cli.output", "quantconvert.hub", "quantconvert.planning.plan"]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_our_modules_are_imported(
    source: Path, module: str, number: signal.Signals, code: int
) -> None:
    found, said = interrupted_while_importing(module, number, "plan", source)
    assert (found, said) == (code, "interrupted: nothing was begun\n")


@pytest.mark.parametrize("module", ["torch", "torch.version", "torch.storage", "torch.nn"])
def test_interrupted_while_torch_is_imported(source: Path, tmp_path: Path, module: str) -> None:
    """An exception inside torch's own initialisation can abort the process: the signal waits for its end."""
    out = tmp_path / "new" / "out"
    found, said = interrupted_while_importing(module, signal.SIGINT, source, out, kernel="torch")
    begun, _, last = said.rstrip("\n").rpartition("\n")
    assert found == 130
    assert re.fullmatch(r"equalizing 14 tensors, .*", begun)
    assert last == "interrupted: the output folder is as it was before"
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *CLI[1:], "convert", "--help"], env=ENV, capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "quantconvert.cli.main" in imported
    assert not imported & {"torch", "numpy", "safetensors", "huggingface_hub"}


# Typos


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["pln", "X"], "plan"),
        (["verfy", "out"], "verify"),
        (["convrt", "m", "out"], "convert"),
        (["Plan", "X"], "plan"),
        (["quantize", "m", "out"], "convert"),
        (["help"], "--help"),
    ],
)
def test_a_mistyped_command_is_no_model(tmp_path: Path, words: list[str], meant: str) -> None:
    """And nothing is asked of the Hub: with `huggingface_hub` out of reach the answer is the same."""
    (tmp_path / "huggingface_hub.py").write_text("raise RuntimeError('the Hub was asked')")
    done = cli(*words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{Path(__file__).parent.parent}")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: `{words[0]}` is no command and no folder\n\n"
        f"hint: did you mean `{meant}`? For a model of that name: quantconvert convert {words[0]} OUT\n"
    )


def test_a_folder_with_a_name_like_a_command_is_a_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "pln").symlink_to(source)
    assert cli("pln", "out", "--dry-run", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--symmetric", "--asymmetric"], "--symmetric contradicts --asymmetric"),
        (["--quiet", "--verbose"], "--quiet contradicts --verbose"),
    ],
)
def test_options_that_contradict_each_other(source: Path, words: list[str], message: str) -> None:
    done = cli("plan", source, *words)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n\nhint: give one of them\n")


# Shell completion


def completed(line: str, cwd: Path) -> list[str]:
    """What bash is offered at the end of a line, by the variables that the parser reads."""
    words = line.split(" ")
    env = {"_QUANTCONVERT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = cli(cwd=cwd, **env)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion(tmp_path: Path) -> None:
    assert completed("quantconvert in", tmp_path) == ["inspect"]
    assert completed("quantconvert convert m out --format a", tmp_path) == ["auto", "awq"]
    assert completed("quantconvert m out --scheme W8", tmp_path) == ["W8A16", "W8A16_ASYM", "W8A8", "W8A8_STATIC"]
    assert completed("quantconvert plan m --preset ", tmp_path) == ["first-last-8", "down-8", "experts-4-rest-8"]
    assert completed("quantconvert plan m --method ", tmp_path) == [
        "rtn",
        "search",
        "gptq",
        "four-over-six",
        "full-range",
    ]
    assert completed("quantconvert plan m --engine v", tmp_path) == ["vllm"]
    assert completed("quantconvert repack m out --format g", tmp_path) == ["gptq"]
    assert completed("quantconvert dequantize m out --dtype f", tmp_path) == ["float16", "float32"]
    assert "--on-indivisible" in completed("quantconvert m out --on", tmp_path)


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_the_completion_script_is_shown(tmp_path: Path, name: str) -> None:
    done = cli("--show-completion", name, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_QUANTCONVERT_COMPLETE" in done.stdout


# The same result, the same bytes


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], ["--bits", "4", "--group-size", "128"]),
        ([], ["--memory-limit", "1GB", "--workers", "1", "--verify", "--max-shard-size", "5000MB", "--verbose"]),
        (["--bits", "8", "--group-size", "64", "--symmetric"], ["--scheme", "W8A16:g64"]),
        (["--ignore", "*.o_proj", "--strict"], ["--ignore=*.o_proj"]),
        (["--method", "rtn"], ["--format", "auto", "--on-indivisible", "error"]),
    ],
)
def test_one_result_has_one_spelling(source: Path, tmp_path: Path, first: list[str], second: list[str]) -> None:
    """In every file, README.md and quantconvert.json included; and its own command makes it again."""
    assert cli(source, "a", *first, cwd=tmp_path).returncode == 0
    assert cli("convert", source, "b", *second, cwd=tmp_path).returncode == 0
    found = snapshot(tmp_path / "a")
    assert found == snapshot(tmp_path / "b")
    card = (tmp_path / "a" / "README.md").read_text()
    command = re.search(r"```bash\nquantconvert SRC OUT(.*)\n```", card)
    assert command
    assert shell(f"{SHELL} {source} again {command[1]}", tmp_path).returncode == 0
    assert snapshot(tmp_path / "again") == found
    assert str(tmp_path) not in card


def test_a_recipe_and_words_say_the_same(source: Path, tmp_path: Path) -> None:
    words = ["--rule", "*.down_proj=W8A16", "--preset", "first-last-8", "--requantize", "--engine", "transformers"]
    recipe = cli("plan", source, *words, "--write-recipe").stdout
    (tmp_path / "r.toml").write_text(recipe)
    plain = json.loads(cli("plan", source, *words, "--format", "compressed-tensors", "--json").stdout)
    again = json.loads(cli("plan", source, "--recipe", tmp_path / "r.toml", "--json").stdout)
    assert plain["digest"] == again["digest"]
