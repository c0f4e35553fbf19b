"""Bytes do not change by accident: conversions of a fixed set equal a table of checksums (`tests/byte_cases.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.byte_cases import TABLE, cases, checksums

EXPECTED: dict[str, Any] = json.loads(TABLE.read_text())
CASES = {name: (source, what, options) for name, source, what, options in cases()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.mark.parametrize("name", CASES)
def test_bytes(name: str, sources: Path, tmp_path: Path):
    source, what, options = CASES[name]
    assert checksums(sources, tmp_path / "out", source, what, options) == EXPECTED[name]


def test_the_table_is_whole():
    assert set(CASES) == set(EXPECTED)
    refused = sum(1 for value in EXPECTED.values() if value == "refused")
    assert len(EXPECTED) - refused > 200
