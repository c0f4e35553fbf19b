"""What many machines would take for DeepSeek-V3, from its plan and from rates that were measured elsewhere.

    python benchmarks/fleet.py [--down MB/S] [--up MB/S] [--cpu CPU-S-PER-GB] [--cores N]

A simulation: each machine takes the next file of the result when it is done with one (`--shards`, or Ray), fetches the
source of it by ranges, converts and sends it; the three go on side by side, so that the slowest of them counts.
"""

from __future__ import annotations

import argparse
import sys
from heapq import heapify, heapreplace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import quantconvert
from quantconvert.run.spool import Schedule, items_of_tasks
from tests.deepseek import write_deepseek_v3


class Load(NamedTuple):
    """What one file of the result costs: bytes in, bytes out."""

    coming: int
    going: int


def loads() -> list[Load]:
    """Of each file of the result, by the headers."""
    with TemporaryDirectory() as folder:
        plan = quantconvert.plan(write_deepseek_v3(Path(folder) / "in"), requantize=True)
    tasks: dict[int, list[object]] = {}
    for task in plan.tasks:
        tasks.setdefault(task.outputs[0].shard, []).append(task)
    return [
        Load(Schedule(items_of_tasks(tasks[number])).nbytes, shard.nbytes)  # type: ignore[arg-type]
        for number, shard in enumerate(plan.shards)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--down", type=float, default=250.0, help="MB a second that one machine fetches")
    parser.add_argument("--up", type=float, default=125.0, help="MB a second that one machine sends")
    parser.add_argument(
        "--cpu", type=float, default=1.9, help="CPU seconds a GB of source (benchmarks/convert.py, MoE)"
    )
    parser.add_argument("--cores", type=int, default=8)
    asked = parser.parse_args()
    files = loads()
    coming, going = sum(f.coming for f in files), sum(f.going for f in files)
    print(f"{len(files)} files, {coming / 1e9:.0f} GB in, {going / 1e9:.0f} GB out; largest file needs "
          f"{max(f.coming for f in files) / 1e9:.1f} GB of source")  # fmt: skip
    print("| machines | wall | bytes moved | what limits |\n|---|---|---|---|")
    rates = {"fetching": asked.down * 1e6, "sending": asked.up * 1e6, "cores": asked.cores * 1e9 / asked.cpu}
    for count in (1, 8, 32):
        ends = [0.0] * count
        heapify(ends)
        for file in files:
            took = max(file.coming / rates["fetching"], file.going / rates["sending"], file.coming / rates["cores"])
            heapreplace(ends, ends[0] + took)
        sums = {"fetching": coming / rates["fetching"], "sending": going / rates["sending"],
                "cores": coming / rates["cores"]}  # fmt: skip
        limit, alone = max(sums, key=sums.__getitem__), max(sums.values()) / count
        rest = "" if max(ends) < 1.1 * alone else f"; {len(files)} files do not divide evenly"
        print(f"| {count} | {max(ends) / 60:.1f} min | {(coming + going) / 1e9:.0f} GB | {limit}{rest} |")


if __name__ == "__main__":
    main()
