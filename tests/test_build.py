"""The C kernel is built from small sources, by the compiler that there is, and loads."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantconvert.kernels.native.library import ABI, FILE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_kernel", ROOT / "scripts" / "build_kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_looks_for_what_is_built(script: ModuleType) -> None:
    assert script.library_name(script.this_machine()[1]) == FILE
    assert {script.library_name(system) for system in ("linux", "macos", "windows")} == {
        "libquantconvert.so", "libquantconvert.dylib", "quantconvert.dll",
    }  # fmt: skip


def test_the_sources_stay_small(script: ModuleType) -> None:
    """The arithmetic of rounding and packing, and every file by itself."""
    lines = {p.name: len(p.read_text().splitlines()) for p in script.FOLDER.iterdir() if p.suffix in (".c", ".h")}
    rounding = ("native.h", "lanes.h", "numbers.h", "row.h", "pack.h", "quantize.c", "levels.c")
    assert 100 < sum(lines[name] for name in rounding) < 700
    assert max(lines.values()) < 300


def test_which_compiler_is_taken(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache my-cc -m64")
    assert script.find_compiler() == ["ccache", "my-cc", "-m64"]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = script.find_compiler()
    assert found is None or found[:3] == [sys.executable, "-m", "ziglang"]
    for name in ("gcc", "cc"):
        path = tmp_path / name
        path.touch(0o755)
        assert script.find_compiler() == [str(path)]


@pytest.mark.process
def test_it_builds_and_loads(script: ModuleType, tmp_path: Path) -> None:
    compiler = script.find_compiler()
    if compiler is None:
        pytest.skip("no C compiler here")
    library = ctypes.CDLL(str(script.build(compiler, out=tmp_path / FILE)))
    assert library.quantconvert_abi() == ABI
    assert library.quantconvert_levels() > 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with pytest.raises(OSError, match="No such file"):
        script.build([str(tmp_path / "no-compiler")], out=tmp_path / "other")
