"""CPU seconds of `verify --source` over those of the conversion, on the dense checkpoint of `convert.py`, in one run.

    python benchmarks/verify.py [--dir FOLDER] [--runs 3] [--case awq ...]

Each run converts (plain and equalized, as the case says) and verifies at once; the least of each is printed, and the
peak memory of verifying. CPU seconds and memory are the kernel's own account of each finished process.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from convert import measured

CASES = {
    "compressed-tensors": ("--format", "compressed-tensors", "--no-equalize"),
    "compressed-tensors asymmetric": ("--format", "compressed-tensors", "--asymmetric", "--no-equalize"),
    "awq": ("--format", "awq", "--no-equalize"),
    "gptq": ("--format", "gptq", "--no-equalize"),
    "awq equalized": ("--format", "awq",),
}  # fmt: skip


def main() -> None:
    """Make the checkpoint where it is missing, then convert and verify each case in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "quantconvert-bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", action="append", choices=list(CASES))
    args = parser.parse_args()
    source, out = args.dir / "dense-4", args.dir / "out-verify"
    if not (source / "config.json").exists():
        # in a process of its own: a child's peak memory starts at its parent's
        maker = Path(__file__).with_name("checkpoints.py")
        subprocess.run([sys.executable, str(maker), "dense", str(source), "--shards", "4"], check=True)
    command = [sys.executable, "-m", "quantconvert"]
    print(f"{'':30} {'convert':>9} {'verify':>9}   ratio   peak memory of verifying")
    for case in args.case or CASES:
        runs = []
        for _ in range(args.runs):
            shutil.rmtree(out, ignore_errors=True)
            made = measured([*command, str(source), str(out), *CASES[case]])
            runs.append((made[1], *measured([*command, "verify", str(out), "--source", str(source)])[1:]))
        converting, verifying, memory = (min(column) for column in zip(*runs, strict=True))
        ratio = verifying / converting
        print(f"{case:30} {converting:7.2f} s {verifying:7.2f} s   {ratio:5.2f}   {memory / 1e6:.0f} MB", flush=True)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
