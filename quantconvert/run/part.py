"""Which shards of a result are one process's to make."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantconvert.errors import UsageError


@dataclass(frozen=True, slots=True)
class Part:
    """The `number`-th of `count` parts, from 1 on: each `count`-th shard."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`2/8`; raises `UsageError`."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.count:
            raise UsageError(f"--shards: expected K/N with K from 1 to N, such as 2/8, got `{text}`")
        return part

    def has(self, shard: int) -> bool:
        """Whether a shard, by its number from 0 on, is in it."""
        return shard % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL = Part(1, 1)
