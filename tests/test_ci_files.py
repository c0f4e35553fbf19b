"""What is there for CI services: the action's own shell steps and the plain script, against a local Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.hub_writes import REPO, TOKEN, State, serve_writes

pytestmark = pytest.mark.process
ROOT = Path(__file__).parent.parent


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """The folder of a runner, with the program where the action has installed it."""
    program = tmp_path / "temp" / "quantconvert" / "bin" / "quantconvert"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m quantconvert "$@"\n')
    program.chmod(0o755)
    write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG)
    return tmp_path


def environment(work: Path, endpoint: str, **more: str) -> dict[str, str]:
    program = work / "temp" / "quantconvert" / "bin"
    own = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_XET": "1",
        "RUNNER_TEMP": str(work / "temp"),
        "GITHUB_OUTPUT": str(work / "output"), "GITHUB_STEP_SUMMARY": str(work / "summary"), "PYTHONPATH": str(ROOT),
        "PATH": f"{program}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return os.environ | own | more


def run_steps(work: Path, endpoint: str, inputs: dict[str, str]) -> None:
    """All steps but the installation, as a runner runs them: their `env`, their shell."""
    yaml = pytest.importorskip("yaml")
    action: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    values = {name: str(given.get("default", "")) for name, given in action["inputs"].items()} | inputs
    assert set(values) == set(action["inputs"])
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]
        if step["name"] == "Install" or (step["name"] == "Push" and not (values["target"] and values["out"])):
            continue
        env = {key: values[text.removeprefix("${{ inputs.").removesuffix(" }}")] for key, text in step["env"].items()}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=work, env=environment(work, endpoint, **env), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        assert TOKEN not in done.stderr + done.stdout


def shown(state: State) -> set[str]:
    return set(state.content()) - {".gitattributes"}


def test_the_action_converts_and_pushes(runner: Path):
    with serve_writes() as (endpoint, state):
        inputs = {
            "source": "in",
            "out": "quantized",
            "target": REPO,
            "group-size": "32",
            "args": "--strict\n\n--ignore=*.o_proj\n",
            "token": TOKEN,
        }
        run_steps(runner, endpoint, inputs)
        out = runner / "quantized"
        assert shown(state) == {path.name for path in out.iterdir()}
        outputs = dict(line.split("=", 1) for line in (runner / "output").read_text().splitlines())
        assert outputs == {
            "out": "quantized", "report": "quantized/quantconvert.json", "commit": state.heads["main"],
            "url": f"{state.hub}/{REPO}/commit/{state.heads['main']}",
        }  # fmt: skip
        assert "done quantized" in (runner / "summary").read_text()


def test_the_action_keeps_nothing(runner: Path):
    with serve_writes() as (endpoint, state):
        inputs = {"source": "in", "target": REPO, "group-size": "32", "token": TOKEN, "disk-limit": "1GB"}
        run_steps(runner, endpoint, inputs)
        outputs = dict(line.split("=", 1) for line in (runner / "output").read_text().splitlines())
        assert outputs == {
            "report": "quantconvert.json", "commit": state.heads["main"],
            "url": f"{state.hub}/{REPO}/commit/{state.heads['main']}",
        }  # fmt: skip
        assert "config.json" in shown(state)
        assert not list(runner.glob(".quantconvert*"))
        assert "done" in (runner / "summary").read_text()


def test_the_action_without_a_target(runner: Path):
    with serve_writes() as (endpoint, state):
        run_steps(runner, endpoint, {"source": "in", "group-size": "32"})
        assert (runner / "quantized" / "config.json").is_file()
        assert state.log == []


def test_the_script_goes_on_where_it_stopped(runner: Path):
    with serve_writes() as (endpoint, state):
        env = environment(runner, endpoint, SOURCE="in", TARGET=REPO, HF_TOKEN=TOKEN)
        command = ["bash", str(ROOT / "examples" / "ci" / "convert.sh"), "--group-size", "32"]
        state.faults["/commit/main"] = 403
        first = subprocess.run(command, cwd=runner, env=env, capture_output=True, text=True)
        assert first.returncode == 5
        second = subprocess.run(command, cwd=runner, env=env, capture_output=True, text=True)
        assert second.returncode == 0, second.stderr
        assert {"config.json", "model.safetensors"} <= shown(state)


def test_a_slurm_array(runner: Path):
    """Each task takes its line of the list."""
    (runner / "models.txt").write_text(f"nowhere me/other\n{runner / 'in'} {REPO}\n")
    with serve_writes() as (endpoint, state):
        more = {
            "HF_TOKEN": TOKEN,
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_CPUS_PER_TASK": "2",
            "TMPDIR": str(runner / "temp"),
        }
        command = ["bash", str(ROOT / "examples" / "ci" / "slurm.sh"), "models.txt", "--group-size", "32"]
        done = subprocess.run(command, cwd=runner, env=environment(runner, endpoint, **more), capture_output=True)
        assert done.returncode == 0, done.stderr
        assert {"config.json", "model.safetensors"} <= shown(state)
