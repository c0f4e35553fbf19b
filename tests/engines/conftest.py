"""Fixtures of engine tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# read when gptqmodel is imported
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


@pytest.fixture(scope="module")
def plain_dequantization() -> Iterator[None]:
    """GPTQModel's kernels without `torch.compile`: 100 s of compiling less, the same numbers."""
    import torch

    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
