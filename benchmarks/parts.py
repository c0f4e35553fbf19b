"""Where the CPU seconds of a conversion go, by exclusive clocks of each thread around each part.

    python benchmarks/parts.py SOURCE OUT [-- OPTIONS OF quantconvert]

`floor` is what the machine takes for the same bytes in the same run: reading the input, writing the output, hashing it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPENT: Counter[str] = Counter()
CALLS: Counter[str] = Counter()
LOCK, OWN = threading.Lock(), threading.local()


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose thread's CPU seconds count for `part`, less those of parts inside it."""

    def call(*args: Any, **options: Any) -> Any:
        inner, OWN.inner = getattr(OWN, "inner", 0.0), 0.0
        begin = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            took = time.thread_time() - begin
            with LOCK:
                SPENT[part] += took - OWN.inner
                CALLS[part] += 1
            OWN.inner = inner + took

    return call


def watch(owner: Any, name: str, part: str) -> None:
    """Time a function or method where it lives."""
    setattr(owner, name, timed(part, getattr(owner, name)))


def watch_all(equalizes: bool) -> None:
    """Every part that a conversion without torch consists of."""
    import quantconvert.conversion as conversion
    from quantconvert.kernels.native.library import Library
    from quantconvert.run.hashing import Hashes
    from quantconvert.run.ledger import Ledger
    from quantconvert.run.work import Bench

    watch(conversion, "make_plan", "plan")
    watch(Library, "convert", "read, quantize, pack, turn, write (one call a unit)")
    watch(Library, "copy", "copied tensors")
    watch(Hashes, "_hash", "sha256 of the files")
    watch(Ledger, "flush", "sync and journal")
    if equalizes:  # it may need torch
        import quantconvert.run.first as first

        watch(first, "first_pass", "first pass (equalization)")
    watch(Bench, "do", "Python around units")
    for name in ("_write_small_files", "report_of", "hash_files"):
        watch(conversion, name, "card, config, report")


def floor(source: Path, out: Path) -> dict[str, float]:
    """CPU seconds for the same bytes: read, written beside the result, hashed."""
    buffer, spent = memoryview(bytearray(1 << 20)), {}
    begin = time.process_time()
    for path in source.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    spent["floor: reading the input"] = time.process_time() - begin
    begin, digest = time.process_time(), hashlib.sha256()
    for path in out.glob("*.safetensors"):
        scratch = path.with_suffix(".scratch")
        with open(path, "rb", buffering=0) as file, open(scratch, "wb", buffering=0) as copy:
            while count := file.readinto(buffer):
                copy.write(buffer[:count])
            os.fdatasync(copy.fileno())
        scratch.unlink()
    spent["floor: writing the output (and reading it)"] = time.process_time() - begin
    begin = time.process_time()
    for path in out.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    spent["floor: sha256 of the output"] = time.process_time() - begin
    return spent


def main() -> None:
    """Convert once, watched, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args, options = parser.parse_known_args()
    from quantconvert.cli.entry import run

    started = time.process_time()
    watch_all("--no-equalize" not in options)
    sys.argv = ["quantconvert", str(args.source), str(args.out), "--overwrite", *(o for o in options if o != "--")]
    begin = time.perf_counter()
    try:
        run()
    except SystemExit as exit:
        if exit.code:
            raise
    wall, total = time.perf_counter() - begin, time.process_time()
    SPENT["interpreter and imports before"] = started
    SPENT["everything else"] = total - sum(SPENT.values())
    print("| part | CPU s | share | calls |\n|---|---|---|---|")
    for part, seconds in sorted(SPENT.items(), key=lambda item: -item[1]):
        print(f"| {part} | {seconds:.2f} | {seconds / total:.0%} | {CALLS[part] or ''} |")
    print(
        f"| **total** (wall {wall:.2f} s, torch {'' if 'torch' in sys.modules else 'not '}imported) | {total:.2f} | | |"
    )
    for part, seconds in floor(args.source, args.out).items():
        print(f"| {part} | {seconds:.2f} | | |")


if __name__ == "__main__":
    main()
