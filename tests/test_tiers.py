"""The tests' own structure: what they share stands in modules of its own, and each has one tier."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.tiers import ENGINES, PROCESS, TESTS, tiers_of

MODULES = sorted(TESTS.rglob("*.py"))


def imported(tree: ast.Module) -> set[str]:
    """Every module that is imported, `from package import module` too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_module_imports_tests(path: Path):
    """Two modules of tests are run, moved and skipped apart; a conftest is pytest's to import."""
    tests = {".".join(("tests", *p.relative_to(TESTS).with_suffix("").parts)) for p in MODULES
             if p.name.startswith("test_") or p.name == "conftest.py"}  # fmt: skip
    assert {"tests.test_cli", "tests.faults.conftest"} <= tests
    assert not imported(ast.parse(path.read_text())) & tests


def test_each_test_has_one_tier(request: pytest.FixtureRequest):
    assert [item.nodeid for item in request.session.items if len(tiers_of(item)) != 1] == []


def test_named_places_exist():
    assert [place for place in PROCESS + ENGINES if not (TESTS / place).exists()] == []


def test_a_unit_test_starts_no_process():
    with pytest.raises(pytest.fail.Exception, match="mark it `process`"):
        subprocess.run(["true"], check=True)


def test_a_unit_test_imports_no_engine():
    with pytest.raises(pytest.fail.Exception, match="imports vllm: mark it `engines`"):
        __import__("vllm")
