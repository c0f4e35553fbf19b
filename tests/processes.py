"""An executor that carries out tasks in other processes, as somebody else would write one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

from quantconvert.events import Progress, Reporter
from quantconvert.run.executors import Build
from quantconvert.run.ledger import Ledger
from quantconvert.run.result import TaskResult

OPTIONS: dict[str, Any] = {"workers": 2, "max_shard_size": "60KB", "executor": "processes"}
ROOT = Path(__file__).parent.parent
# Reads a pickled Build and numbers of tasks, writes the pickled results; dies where it is told to.
CHILD = """
import os, pickle, signal, sys, warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
from quantconvert.run.executors.carry import carry_out_tasks
torch.set_num_threads(1)
build, numbers = pickle.load(sys.stdin.buffer)
found = carry_out_tasks(build, numbers)
if set(numbers) & set(map(int, os.environ.get("DIE_AFTER", "").split())):
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdout.buffer.write(pickle.dumps(found))
"""


class Processes:
    """Batches of tasks, two processes at a time, dealt out so that both write into the same files."""

    name = "processes"
    batch = 11

    def run(self, build: Build, tasks: Sequence[int], ledger: Ledger, report: Reporter) -> None:
        batches = [tasks[i :: -(-len(tasks) // self.batch)] for i in range(-(-len(tasks) // self.batch))]
        for i in range(0, len(batches), 2):
            pair = [(self._start(build, numbers), numbers) for numbers in batches[i : i + 2]]
            try:
                for child, numbers in pair:
                    for index, result in self._answer(child, numbers):
                        ledger.add(index, result)
                        task = build.plan.tasks[index]
                        report(Progress(task.source.name, task.source.nbytes))
            finally:
                for child, _ in pair:
                    child.kill()
                    child.__exit__(None, None, None)
            ledger.flush()

    def _start(self, build: Build, numbers: Sequence[int]) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=PIPE, stdout=PIPE, cwd=ROOT)
        assert child.stdin
        child.stdin.write(pickle.dumps((build, tuple(numbers))))
        child.stdin.close()
        return child

    def _answer(self, child: subprocess.Popen[bytes], numbers: Sequence[int]) -> list[tuple[int, TaskResult]]:
        assert child.stdout
        data = child.stdout.read()
        if child.wait():
            raise RuntimeError(f"the process for tasks {list(numbers)} ended with {child.returncode}")
        found: list[tuple[int, TaskResult]] = pickle.loads(data)
        return found
