"""Where a result is that is verified: in a folder, or on the Hub, of which its small files are in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantconvert.checkpoint import LocalFolder, Repo, load_checkpoint
from quantconvert.checkpoint.ranges import Files
from quantconvert.run.spool import direct
from quantconvert.spans import spans
from quantconvert.streaming import Wish, by_ranges
from quantconvert.verification.report import sha256_of

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A result. folder: has its small files. repo: has all of them."""

    folder: Path
    repo: Repo

    @classmethod
    def of(cls, folder: Path) -> Place:
        """A folder that has all; raises `CheckpointError` where there is none."""
        return cls(folder, LocalFolder(folder))


def sum_of(repo: Repo, name: str) -> str | None:
    """The sha256 of a file's bytes; of a large file on the Hub, where it lies under its sum, the Hub's own word. None
    where there is no such file.
    """
    if isinstance(repo, LocalFolder):
        return sha256_of(repo.path / name) if (repo.path / name).is_file() else None
    file = next((file for file in repo.files() if file.path == name), None)
    if file is None or file.sha256:
        return file.sha256 if file else None
    digest, part = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with closing(Files(direct(repo))) as files:
        for begin, end in spans(0, file.nbytes, _CHUNK):
            files.read_into(name, part[: end - begin], begin)
            digest.update(part[: end - begin])
    return digest.hexdigest()


def sums_of(repo: Repo, names: Sequence[str], workers: int) -> dict[str, str]:
    """The same of several files that are there."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        sums = list(pool.map(partial(sum_of, repo), names))
    return {name: sum_ for name, sum_ in zip(names, sums, strict=True) if sum_}


@contextmanager
def sides(result: Repo, source: Repo | None, wish: Wish) -> Iterator[tuple[Place, Repo | None]]:
    """A result and its source, ready to be read: what is on the Hub and not in the cache comes by ranges."""
    with ExitStack() as stack:
        if isinstance(result, LocalFolder):
            place = Place(result.path, result)
        else:
            weights = {file.path for file in load_checkpoint(result).weight_files}
            small = tuple(file.path for file in result.files() if file.path not in weights)
            place = Place(result.materialize(small), stack.enter_context(by_ranges(result, wish, 2)))
        yield place, stack.enter_context(by_ranges(source, wish, 2)) if source is not None else None
