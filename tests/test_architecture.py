"""docs/architecture.md is true: rooms and their order, the places of new things; no room knows the names of another."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import quantconvert
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS
from quantconvert.sources import ENCODINGS

PACKAGE = Path(quantconvert.__file__).parent
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, code marks removed."""
    part = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


ROOMS = [room for room, _ in table("Rooms")]


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path, ast.parse(path.read_text())


def test_every_room_is_on_the_map():
    assert {room for room, _, _ in modules()} == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


def test_rooms_import_only_from_those_above():
    """The order of the table is the order of the design: no cycles can hide in it."""
    for room, path, tree in modules():
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quantconvert":
                parts = (node.module or "").split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                for other in names:
                    assert ROOMS.index(other) <= ROOMS.index(room), f"{path.name} imports {other}"


@pytest.mark.parametrize("row", table("Where a new thing goes"), ids=lambda row: row[0])
def test_a_new_thing_has_its_place(row: list[str]):
    """The folder is there, the registry is there with something in it that lives there, and a test shows it."""
    _, place, registry, shown = row
    folder = re.sub(r"^a (row|line) in `?", "", place).rpartition("/")[0]
    assert (ROOT / folder).is_dir()
    module, _, name = registry.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert (ROOT / shown).is_file()
    if isinstance(found, Mapping) and "<name>" in place:
        for item in found.values():
            home = type(item).__module__ if not hasattr(item, "rows") or callable(item.rows) else module
            assert home.replace(".", "/").startswith(folder), item


@pytest.mark.parametrize("path", re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", TEXT))
def test_every_path_in_the_text_exists(path: str):
    assert (PACKAGE / path).exists() or (ROOT / path).exists()


def test_no_room_knows_the_names_of_another():
    """An `if` on a name is a protocol that is too narrow."""
    names = {*LAYOUTS, *METHODS, *ENCODINGS} - {"plain", "codes"}
    homes = {"layouts", "methods", "sources", "engines", "integrations"}
    for room, path, tree in modules():
        for node in ast.walk(tree) if room not in homes else ():
            if isinstance(node, ast.Compare):
                texts = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not texts & names, f"{path}:{node.lineno} compares with {texts & names}"
