"""Processes on one host beside threads: `--shards K/N` by N processes at once, then the command that finishes.

    python benchmarks/shards.py [--processes 2,4,8]

Prints wall seconds of one process with as many workers as there are cores, and of N processes with one worker each:
until all parts are there, and until the result is in place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.checkpoints import make

WORDS = ["--max-shard-size", "60MB", "--quiet"]


def start(source: Path, out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "quantconvert", str(source), str(out), *WORDS, *words]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1])


def wait(*processes: subprocess.Popen[bytes]) -> None:
    codes = [process.wait() for process in processes]
    assert not any(codes), codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="2,4,8")
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in"
        make("dense", source)
        wait(start(source, folder / "warm"))
        begun = time.perf_counter()
        wait(start(source, folder / "threads"))
        print(f"one process, threads: {time.perf_counter() - begun:.2f} s")
        for count in map(int, asked.processes.split(",")):
            out, begun = folder / f"out{count}", time.perf_counter()
            wait(*(start(source, out, "--shards", f"{k + 1}/{count}", "--workers", "1") for k in range(count)))
            parts = time.perf_counter() - begun
            wait(start(source, out))
            print(f"{count} processes: parts {parts:.2f} s, with the end {time.perf_counter() - begun:.2f} s")


if __name__ == "__main__":
    main()
