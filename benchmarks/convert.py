"""Times conversions against the floor: what nobody can avoid for the same bytes, in the same run.

    python benchmarks/convert.py [--kind dense|experts] [--dir FOLDER] [--formats NAME,NAME] [--workers N,N] [--runs 3]
                                 [--shards 4] [--out-shard-size SIZE] [-- OPTIONS OF quantconvert]

The floor reads the input, writes as many bytes as the output has, syncs them, and takes one sha256 over them. `plain`
is with `--no-equalize`, `default` without it. CPU seconds and peak memory are the system's own account of each finished
process. `dense` is of Llama-3.2-1B's shape (3.0 GB), `experts` a mixture of 3,072 small matrices (1.7 GB).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def floor(source: Path, result: Path, scratch: Path) -> None:
    """Read every input byte into one buffer; write, sync and hash as many bytes as the result has."""
    buffer, digest = memoryview(bytearray(CHUNK)), hashlib.sha256()
    scratch.mkdir(parents=True)
    for path in weights_of(source):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in weights_of(result):
        with open(scratch / path.name, "wb", buffering=0) as file:
            left = path.stat().st_size
            while left:
                part = buffer[: min(CHUNK, left)]
                digest.update(part)
                left -= file.write(part)
            os.fdatasync(file.fileno())
    shutil.rmtree(scratch)


def measured(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of one child process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    talk = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(talk.decode())
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def variants(args: argparse.Namespace, source: Path, out: Path, options: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each conversion that is timed: its name and its command."""
    for fmt in args.formats.split(","):
        for count in args.workers.split(","):
            for name, more in (("plain", ["--no-equalize"]), ("default", [])):
                if name in args.variants.split(","):
                    command = [sys.executable, "-m", "quantconvert", str(source), str(out), "--format", fmt]
                    limits = ["--workers", count, *(["--max-shard-size", args.size] if args.size else [])]
                    yield f"{fmt}, {name}, {count} workers", [*command, *limits, *more, *options]


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and options of quantconvert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kind", default="dense", choices=("dense", "experts"))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "quantconvert-bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--formats", default="compressed-tensors,awq,gptq,rtn")
    parser.add_argument("--variants", default="plain,default")
    parser.add_argument("--workers", default=str(min(8, len(os.sched_getaffinity(0)))))
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--out-shard-size", dest="size")
    parser.add_argument("--floor", nargs=3, metavar=("SRC", "OUT", "SCRATCH"), help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    return args, [option for option in options if option != "--"]


def main() -> None:
    """Make the checkpoint where it is missing, then alternate floor and conversion, and print medians."""
    args, options = parsed()
    if args.floor:
        floor(*map(Path, args.floor))
        return
    source, out = args.dir / f"{args.kind}-{args.shards}", args.dir / "out"
    if not (source / "config.json").exists():
        # in a process of its own: a child's peak memory starts at its parent's
        maker = Path(__file__).with_name("checkpoints.py")
        command = [sys.executable, str(maker), args.kind, str(source), "--shards", str(args.shards)]
        subprocess.run(command, check=True)
    size = sum(path.stat().st_size for path in weights_of(source))
    print(f"{args.kind}: {size / 1e9:.2f} GB in {args.shards} files, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"medians of {args.runs}\n\n| | wall s | CPU s | peak RSS MB | wall / floor | CPU / floor |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, command in variants(args, source, out, options):
        runs: list[tuple[float, float, int]] = []
        floors: list[tuple[float, float, int]] = []
        floor_command = [sys.executable, __file__, "--floor", str(source), str(out), str(args.dir / "scratch")]
        for i in range(args.runs + 1):  # the first warms the page cache
            shutil.rmtree(out, ignore_errors=True)  # freeing an old result's pages is not what is timed
            runs.append(measured(command))
            floors.append(measured(floor_command))
            if i == 0:
                runs.clear()
                floors.clear()
        show(f"{name}", runs, floors)
        show("floor", floors, floors)
    shutil.rmtree(out, ignore_errors=True)


def show(name: str, runs: list[tuple[float, float, int]], floors: list[tuple[float, float, int]]) -> None:
    """A line of the table: medians, and medians of the ratios of neighbouring runs."""
    wall, cpu, rss = (statistics.median(column) for column in zip(*runs, strict=True))
    walls, cpus = (statistics.median(r[i] / f[i] for r, f in zip(runs, floors, strict=True)) for i in (0, 1))
    print(f"| {name} | {wall:.2f} | {cpu:.2f} | {rss / 1e6:.0f} | {walls:.2f} | {cpus:.2f} |", flush=True)


if __name__ == "__main__":
    main()
