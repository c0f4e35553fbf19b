"""Workers in each of which torch runs single-threaded: their number is that of the busy cores. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded() -> Iterator[None]:
    """Torch's own threads spin while they wait: on a busy machine that takes ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def worker_pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` such threads; the caller is single-threaded meanwhile, too."""
    with single_threaded(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
