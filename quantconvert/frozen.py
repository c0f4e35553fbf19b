"""Dataclasses of which there are a hundred thousand: frozen for mypy, which sees every line that could change one.

To freeze them while they run too would make each five times as slow to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def frozen(kind: type[T]) -> type[T]:
    """As `dataclass(frozen=True, slots=True)`, hash and all, but for the price."""
    return dataclass(slots=True, unsafe_hash=True)(kind)
