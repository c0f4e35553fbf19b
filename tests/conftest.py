"""Fixtures that several files share."""

from tests.inputs import toy_families

__all__ = ["toy_families"]
