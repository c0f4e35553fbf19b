"""The build hook: compiles the C kernel where there is a compiler, asks for one where there is none, else goes without.

QUANTCONVERT_KERNEL=torch builds without the kernel; QUANTCONVERT_TARGET and QUANTCONVERT_PLATFORM, by which
`scripts/build_wheels.py` calls it, build for another machine. `quantconvert --version` says what an installation has.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Systems and processors that ziglang has wheels for.
ZIG = {(system, machine) for system in ("linux", "macos", "windows") for machine in ("x86_64", "aarch64")}


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """For wheels, editable ones too: those compile into the source tree."""

    PLUGIN_NAME = "custom"
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        """Zig's compiler as a wheel, where nothing else compiles."""
        kernel = self._script()
        if not self._is_wanted() or kernel.find_compiler() or kernel.this_machine()[::-1] not in ZIG:
            return []
        return ["ziglang>=0.13"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for its platform; what fails is said, and the wheel is one without it."""
        kernel = self._script()
        target = os.environ.get("QUANTCONVERT_TARGET")
        if target and self._is_wanted():
            self._compile_for(target, kernel, build_data)
            return
        if not self._is_wanted():
            if self.target_name == "wheel" and version == "editable":
                (kernel.FOLDER / kernel.library_name(kernel.this_machine()[1])).unlink(missing_ok=True)
            return
        compiler = kernel.find_compiler()
        if compiler is None:
            self.app.display_warning("no C compiler: installed without the C kernel; torch does its work, more slowly")
            return
        try:
            library: Path = kernel.build(compiler)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"the C kernel could not be compiled: {error}; torch does its work, more slowly")
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(kernel.this_machine()[0])}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled for another machine."""
        if self._folder is not None:
            self._folder.cleanup()

    def _compile_for(self, target: str, kernel: ModuleType, build_data: dict[str, Any]) -> None:
        """Compile for `target`, as Zig calls it, beside the source tree; raises what stops it."""
        self._folder = tempfile.TemporaryDirectory()
        name = kernel.library_name(kernel.machine_of(target)[1])
        library = kernel.build(kernel.zig()[:4], target, Path(self._folder.name, name))
        place = kernel.FOLDER.relative_to(self.root) / name
        build_data["force_include"][str(library)] = place.as_posix()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{os.environ['QUANTCONVERT_PLATFORM']}"

    def _is_wanted(self) -> bool:
        return self.target_name == "wheel" and os.environ.get("QUANTCONVERT_KERNEL") != "torch"

    def _script(self) -> ModuleType:
        path = Path(self.root, "scripts", "build_kernel.py")
        spec = importlib.util.spec_from_file_location("build_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _platform(processor: str) -> str:
    """The platform of a wheel's tag; of a Python for two processors, the one that was compiled for."""
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if sys.platform == "darwin":
        tag = tag.replace("universal2", {"aarch64": "arm64"}.get(processor, processor))
    return tag
