"""The README says what the program does: commands, formats, exit codes, options, and the output it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quantconvert
from quantconvert import errors
from quantconvert.layouts import LAYOUTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def readme_command(name: str) -> list[str]:
    """The lines of the command marked `<!-- command: name -->`, as .ci/run takes them."""
    match = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.S)
    assert match
    return match[1].splitlines()


def test_the_main_command_is_the_one_shown_and_prints_what_is_shown(tmp_path: Path):
    last = shlex.split(readme_command("main")[-1])
    assert last[0].endswith("bin/quantconvert")
    words = [str(tmp_path / "out") if word == "out" else word for word in last[1:]]
    command = [sys.executable, "-m", "quantconvert", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    shown = README.split("```\nequalizing", 1)[1].split("```", 1)[0]
    volatile = ("time", "peak memory", "load it", "  ", "done")

    def stable(text: str) -> list[str]:
        lines = [re.sub(r"\s+", " ", line.strip()) for line in text.splitlines() if not line.startswith(volatile)]
        return [line for line in lines if line and "from_pretrained" not in line and "converting" not in line]

    assert stable(done.stderr) == stable("equalizing" + shown)


def test_verify_prints_what_is_shown(tmp_path: Path):
    program = [sys.executable, "-m", "quantconvert"]
    command = shlex.split(readme_command("main")[-1])[1:]
    words = [str(ROOT / word) if "/" in word else word for word in command]
    subprocess.run([*program, *words, "--quiet"], cwd=tmp_path, check=True)
    shown = README.split("$ quantconvert verify", 1)[1].split("```", 1)[0].split("\n", 1)
    words = [str(ROOT / word) if "/" in word else word for word in shlex.split(shown[0])]
    done = subprocess.run([*program, "verify", *words], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.replace(f"{ROOT}/", "") == shown[1]


def test_the_test_command_installs_with_the_constraints():
    lines = readme_command("tests")
    assert any("-c constraints.txt" in line and "test" in line for line in lines)
    assert lines[-1].endswith("-m pytest -q")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format_stands_in_the_readme(name: str):
    assert f"`{name}`" in README


def test_exit_codes_stand_in_the_readme():
    codes = {getattr(errors, name).exit_code for name in dir(errors) if name.endswith("Error")} - {1}
    for code in codes:
        assert re.search(rf"^\| {code} \|", README, re.M), code


def test_the_tables_of_engines_are_those_of_the_rows():
    command = [sys.executable, "-m", "quantconvert.engines"]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert len(tables) == 2
    assert all(len(table.splitlines()) > 5 and table.strip() in README for table in tables)


@pytest.mark.parametrize("command", ["convert", "plan", "finish", "inspect", "verify", "repack", "dequantize"])
def test_help_describes_every_option(command: str):
    words = [sys.executable, "-m", "quantconvert", command, "--help"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M)
    assert "--json" in options
    assert quantconvert.__version__


def test_no_registry_host_and_no_tool_of_ours_is_named():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("registry", "npmjs"))]
    for file in files:
        path = ROOT / file
        if path.suffix in {".py", ".md", ".toml", ".txt", ".sh"} or file == ".ci/run":
            text = path.read_text()
            assert not [host for host in hosts if host in text], file


def test_the_package_says_what_it_is():
    """Classifiers and addresses for whoever finds it in an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Typing :: Typed" in project["classifiers"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(project["classifiers"])
    assert set(project["urls"]) == {"Repository", "Changelog", "Issues"}
