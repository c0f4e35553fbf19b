#!/usr/bin/env python3
"""Builds a wheel for each platform, and one without the C kernel, on whatever machine this is.

    pip install hatchling ziglang
    python scripts/build_wheels.py [--out dist] [TARGET ...]

A target is what Zig calls it; all of them unless named. `pure` is the wheel for every other platform: torch does the
kernel's work there. One wheel of each serves all Pythons: the library is loaded by `ctypes`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Zig's target to the platform of the wheel's tag. glibc 2.17 is of 2012; macOS 11 is the first for arm64.
TAGS: Mapping[str, str] = {
    "x86_64-linux-gnu.2.17": "manylinux_2_17_x86_64.manylinux2014_x86_64",
    "aarch64-linux-gnu.2.17": "manylinux_2_17_aarch64.manylinux2014_aarch64",
    "aarch64-macos.11.0": "macosx_11_0_arm64",
    "x86_64-macos.11.0": "macosx_11_0_x86_64",
    "x86_64-windows-gnu": "win_amd64",
}
PURE = "pure"


def environment(target: str) -> dict[str, str]:
    """What tells `hatch_build.py` the platform."""
    if target == PURE:
        return {**os.environ, "QUANTCONVERT_KERNEL": "torch"}
    return {**os.environ, "QUANTCONVERT_TARGET": target, "QUANTCONVERT_PLATFORM": TAGS[target]}


def main() -> None:
    """Build what is named; hatchling prints each wheel's path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join((*TAGS, PURE)))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    unknown = sorted(set(args.targets) - {*TAGS, PURE})
    if unknown:
        parser.error(f"expected some of {', '.join((*TAGS, PURE))}, got {', '.join(unknown)}")
    for target in args.targets or (*TAGS, PURE):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(args.out.resolve())]
        subprocess.run(command, check=True, cwd=ROOT, env=environment(target))


if __name__ == "__main__":
    main()
