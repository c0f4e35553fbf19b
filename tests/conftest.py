"""Fixtures that several files share; each test gets its tier."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.defaults import default_of_equalize
from tests.inputs import toy_families
from tests.tiers import ENGINES, Watch, tier_of, tiers_of

__all__ = ["toy_families"]

WATCH = Watch()
sys.addaudithook(WATCH)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not tiers_of(item):
            item.add_marker(tier_of(item.path))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Engines take seconds to import, which their files do: not where only another tier is asked for."""
    return True if config.option.markexpr in ("unit", "process") and collection_path.name in ENGINES else None


@pytest.fixture(scope="session", autouse=True)
def plain_rounding() -> Iterator[None]:
    """What is not about equalization does not equalize: most tests compare with the source's own values."""
    with default_of_equalize(False):
        yield


@pytest.fixture
def auto_equalize() -> Iterator[None]:
    """The default that users have."""
    with default_of_equalize(None):
        yield


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """The watch is on while a unit test runs."""
    WATCH.on = tiers_of(request.node) == ["unit"]
    yield
    WATCH.on = False
