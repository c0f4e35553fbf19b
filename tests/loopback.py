"""huggingface_hub in this process against a Hub on the loopback address, without waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub_writes import TOKEN, State, serve_writes


@contextmanager
def loopback(monkeypatch: pytest.MonkeyPatch, source: Path | None, cache: Path) -> Iterator[State]:
    """The Hub that everything in this process talks to; `cache` is huggingface_hub's."""
    with serve_writes(source) as (endpoint, state), monkeypatch.context() as patch:
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DOWNLOAD_TIMEOUT": 30,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("QUANTCONVERT_STAGE_SECONDS", "0.01")
        patch.setattr("quantconvert.hub.retry.time.sleep", lambda seconds: None)
        yield state
