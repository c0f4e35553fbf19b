#!/usr/bin/env python3
"""Compiles the C kernel into the package. `hatch_build.py` calls this when the package is installed.

    python scripts/build_kernel.py [--compiler "COMMAND ..."] [--target TRIPLE] [--out FILE]

The compiler is CC, else cc, gcc or clang, else ziglang where Python has it. target: for another machine, as Zig calls
it: `x86_64-linux-gnu.2.17`, `aarch64-linux-gnu.2.17`, `aarch64-macos`, `x86_64-windows-gnu`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "quantconvert" / "kernels" / "native"
# No contraction: a fused multiply-add rounds once where the reference rounds twice.
FLAGS = (
    "-std=c11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd")
# Files that are compiled once, and those that are once for each of x86-64's levels; `levels.c` asks the processor for
# what these use.
SHARED, LEVELED = ("levels.c", "io.c"), ("quantize.c", "unit.c", "factors.c", "check.c")
LEVELS = {"v2": ("-mssse3", "-msse4.1"), "v3": ("-mavx2",), "v4": ("-mavx2", *AVX512)}


def find_compiler() -> list[str] | None:
    """The command that compiles C here; None where there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if found:
        return [found]
    return zig() if importlib.util.find_spec("ziglang") else None


def zig() -> list[str]:
    """Zig's compiler, for any processor of this kind: without a target it compiles for the very one that it runs on."""
    processor, system = this_machine()
    libc = {"windows": "-gnu", "macos": ""}.get(system, "-gnu.2.17" if platform.libc_ver()[0] == "glibc" else "-musl")
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{processor}-{system}{libc}"]


def library_name(system: str) -> str:
    """What `quantconvert/kernels/native/library.py` looks for on a system, as Zig calls it."""
    return {"windows": "quantconvert.dll", "macos": "libquantconvert.dylib"}.get(system, "libquantconvert.so")


def this_machine() -> tuple[str, str]:
    """Processor and system, as Zig calls them."""
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, "linux")
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine), system


def machine_of(target: str) -> tuple[str, str]:
    """Processor and system of a target of Zig's, whose system may have a version."""
    processor, system = target.split("-")[:2]
    return processor, system.partition(".")[0]


def build(compiler: list[str], target: str | None = None, out: Path | None = None) -> Path:
    """Compile for `target`, this machine unless told; raises `OSError` and `subprocess.CalledProcessError`."""
    processor, system = machine_of(target) if target else this_machine()
    out = out or FOLDER / library_name(system)
    command = [*compiler, *(["-target", target] if target else []), *FLAGS]
    command += [] if system == "windows" else ["-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder, f"{file}.o") for file in SHARED]
        for file, compiled in zip(SHARED, objects, strict=True):
            subprocess.run([*command, "-c", str(FOLDER / file), "-o", str(compiled)], check=True)
        for level, flags in (LEVELS if processor == "x86_64" else {"plain": ()}).items():
            for file in LEVELED:
                objects.append(Path(folder, f"{level}-{file}.o"))
                source = [f"-DLEVEL={level}", "-c", str(FOLDER / file), "-o", str(objects[-1])]
                subprocess.run([*command, *flags, *source], check=True)
        new = Path(folder, "library")
        subprocess.run([*command, "-shared", "-s", *map(str, objects), "-o", str(new)], check=True)
        # beside the old one, then in its place: a process that has loaded it keeps what it has
        shutil.copyfile(new, out.with_suffix(".new"))
        out.with_suffix(".new").replace(out)
    return out


def main() -> None:
    """Build as told, and print where the library is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", help="a command and its first arguments")
    parser.add_argument("--target", help="another machine, by Zig")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    compiler = shlex.split(args.compiler) if args.compiler else zig()[:4] if args.target else find_compiler()
    if compiler is None:
        sys.exit("no C compiler: expected CC, cc, gcc, clang, or `pip install ziglang`")
    print(build(compiler, args.target, args.out))


if __name__ == "__main__":
    main()
