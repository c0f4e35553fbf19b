"""The tier of each test, and what a unit test must not do.

unit: in this process, without an engine. process: starts processes, or takes long: faults, fuzz, memory. engines: with
other people's code. A test's own mark goes before its file's tier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
TIERS = ("unit", "process", "engines")
# Files and folders of other tiers than `unit`.
ENGINES = ("engines",)
PROCESS = (
    "faults", "hostile/test_cases.py", "hostile/test_fuzz.py", "hostile/test_secrets.py", "test_cli.py", "test_docs.py",
    "test_executors.py", "test_hub.py", "test_large.py", "test_memory.py",
)  # fmt: skip
# What no unit test does, as `sys.audit` calls it, and packages that none imports.
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
FOREIGN = {"accelerate", "compressed_tensors", "gptqmodel", "sglang", "transformers", "vllm"}


def tier_of(path: Path) -> str:
    """The tier of a file of tests."""
    places = {path.relative_to(TESTS).as_posix(), *(p.as_posix() for p in path.relative_to(TESTS).parents)}
    return "engines" if places & set(ENGINES) else "process" if places & set(PROCESS) else "unit"


def tiers_of(item: pytest.Item) -> list[str]:
    """Every tier that marks the test."""
    return [mark.name for mark in item.iter_markers() if mark.name in TIERS]


class Watch:
    """Fails a unit test that starts a process or imports an engine. (One imported before goes unseen.)"""

    def __init__(self) -> None:
        self.on = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in STARTS:
            pytest.fail(f"a unit test starts a process ({event}): mark it `process`")
        if self.on and event == "import" and args[0].partition(".")[0] in FOREIGN:
            pytest.fail(f"a unit test imports {args[0]}: mark it `engines`")
