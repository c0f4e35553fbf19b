"""The command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ENV = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
ENV |= {"HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}
CLI = [sys.executable, "-m", "quantconvert"]


def cli(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, with pipes for stdout and stderr."""
    return subprocess.run(
        [*CLI, *map(str, args)], cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=60, check=False
    )
