"""Many models, as many at a time as there are processes: a task a model, and of a large one a task a part of its files.

    python fleet.py OUT MODEL [MODEL ...]

Local folders or Hub ids; results are OUT/<name>. The same command goes on where it stopped. On a cluster the same two
calls are the tasks of whatever runs it there: `convert(..., shards="2/8")` makes a part, `convert(...)` finishes.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import quantconvert

LARGE_NBYTES = 20_000_000_000


class Work(NamedTuple):
    """What one process does; part None: all of it, or the end of it."""

    source: str
    out: Path
    part: str | None = None


def parts_of(source: str, out: Path) -> list[Work]:
    """The parts of a large model; none of a small one."""
    plan = quantconvert.plan(source)
    count = len(plan.shards) if plan.checkpoint.nbytes > LARGE_NBYTES else 0
    return [Work(source, out, f"{number + 1}/{count}") for number in range(count)]


def do(work: Work) -> str:
    """One task; of a model that is done nothing is left."""
    if not (work.out / "config.json").exists():
        quantconvert.convert(work.source, work.out, shards=work.part, workers=1)
    return f"{work.out}{f' part {work.part}' if work.part else ''}"


def main(out: Path, sources: list[str]) -> None:
    models = [(source, out / source.rstrip("/").rpartition("/")[2]) for source in sources]
    with ProcessPoolExecutor() as pool:
        parts = [part for found in pool.map(parts_of, *zip(*models, strict=True)) for part in found]
        for tasks in (parts, [Work(*model) for model in models]):
            for line in pool.map(do, tasks):
                print(line, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
