"""CPU seconds and peak memory of what should be there at once: help, and plans of a small and of a very large model.

    python benchmarks/startup.py [--runs 5]

Llama-3.2-1B's shapes (3.0 GB, 5 files), and DeepSeek-V3's (689 GB, 163 files, 91,991 tensors), both as files of which
only the headers take space. Of a busy machine the best of several runs says most; the first line is a loop of plain
Python, by which machines and minutes can be compared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = [sys.executable, "-m", "quantconvert"]
LOOP = [sys.executable, "-c", "for i in range(3_000_000): j = i + i"]


def make(folder: Path) -> None:
    """The two sources. In a process of its own: the peak memory of a child begins at its parent's."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.deepseek import write_deepseek_v3
    from tests.llama_shapes import write_llama_1b

    write_llama_1b(folder / "llama-1b")
    write_deepseek_v3(folder / "deepseek-v3")


def best(command: list[str], runs: int, compiled: Path) -> tuple[float, float]:
    """The least CPU seconds (user and system), and peak resident megabytes, of `runs` processes one after the other.

    compiled: where Python keeps what it compiles, as it does of an installed package; the first run of all fills it.
    """
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    usages = []
    for _ in range(runs):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=own | {"PYTHONPYCACHEPREFIX": str(compiled)})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
        usages.append(usage)
    return min(u.ru_utime + u.ru_stime for u in usages), min(u.ru_maxrss for u in usages) * 1024 / 1e6


def main() -> None:
    """Make the sources, run each command, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make)
        return
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, __file__, "--make", name], check=True)
        small, large = Path(name) / "llama-1b", Path(name) / "deepseek-v3"
        commands = {
            "a loop of Python": LOOP,
            "--help": [*PROGRAM, "--help"],
            "convert --help": [*PROGRAM, "convert", "--help"],
            "plan, Llama-3.2-1B": [*PROGRAM, "plan", str(small)],
            "plan, DeepSeek-V3": [*PROGRAM, "plan", str(large), "--requantize"],
            "plan, DeepSeek-V3, --no-equalize": [*PROGRAM, "plan", str(large), "--requantize", "--no-equalize"],
        }
        print(f"best of {args.runs}\n\n| | CPU s | peak RSS MB |\n|---|---|---|")
        for what, command in commands.items():
            cpu, peak = best(command, args.runs, Path(name) / "compiled")
            print(f"| {what} | {cpu:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
