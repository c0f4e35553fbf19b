"""Imports that wait until they are needed."""

from __future__ import annotations

import warnings


def load_torch() -> None:
    """Import torch without its complaint that NumPy is missing: neither of us needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch  # noqa: F401
