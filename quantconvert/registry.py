"""The one kind of registry: things by name, in order, with an error that lists what there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from quantconvert.errors import UsageError


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T], Generic[T]):
    """Items by their `name`, in the order of registration.

    kind: the word for an item in errors, which is also the option that chooses it. also: words that the option takes
    beside the names.
    """

    def __init__(self, kind: str, *items: T, also: tuple[str, ...] = ()) -> None:
        self.kind, self.also = kind, also
        self._items: dict[str, T] = {item.name: item for item in items}

    def __getitem__(self, name: str) -> T:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def find(self, name: str) -> T:
        """The item of that name; raises `UsageError` with the known ones."""
        if name not in self._items:
            known = ", ".join((*self.also, *self._items))
            raise UsageError(f"--{self.kind}: unknown {self.kind} `{name}`", hint=f"known {self.kind}s: {known}")
        return self._items[name]

    def register(self, item: T, *, first: bool = False) -> T:
        """Add an item, at the end or `first`; raises `ValueError` for a name that is taken."""
        if item.name in self._items:
            raise ValueError(f"{self.kind} {item.name} is registered already")
        self._items = {item.name: item, **self._items} if first else {**self._items, item.name: item}
        return item

    @contextmanager
    def added(self, item: T, *, first: bool = False) -> Iterator[T]:
        """Have an item for a while."""
        self.register(item, first=first)
        try:
            yield item
        finally:
            del self._items[item.name]
