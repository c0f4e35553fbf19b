"""What else a name may have meant."""

from __future__ import annotations

import difflib
from pathlib import Path


def near(text: str) -> str | None:
    """A folder that the user may have meant."""
    path = Path(text)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean `{path.parent / close[0]}`?" if close else None
