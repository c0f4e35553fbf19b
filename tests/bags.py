"""A bag of tokens through a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from quantconvert.checkpoint import LocalFolder, load_checkpoint
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import QuantConvertError
from quantconvert.factors.bag import bag
from quantconvert.factors.draws import Draws
from quantconvert.factors.room import Execution
from quantconvert.factors.tiles import Advance
from quantconvert.factors.walk import Walk, find_walk
from quantconvert.families import find_family
from quantconvert.sources import find_sources


class Limits(NamedTuple):
    """What a bag may use."""

    workers: int = 1
    slab_nbytes: int = 1 << 20
    memory_limit: int = 1 << 30


def silently(name: str, nbytes: int) -> None:
    """Tells nobody."""


def walk_of(folder: Path) -> Walk | str:
    """The walk through a checkpoint, or why there is none."""
    repo, errors = LocalFolder(folder), list[QuantConvertError]()
    checkpoint = load_checkpoint(repo)
    family = find_family(checkpoint)
    sources = find_sources(checkpoint, family, lambda ref: repo.read(ref.file, ref.offset, ref.nbytes), errors)
    assert not errors, errors
    return find_walk({read.name: read for read in sources.reads}, family, checkpoint)


def importances(
    folder: Path, draws: Draws | None = None, execution: Execution | None = None, advance: Advance = silently
) -> dict[str, Tensor]:
    """What a bag finds in a checkpoint that has a walk."""
    walk = walk_of(folder)
    assert isinstance(walk, Walk), walk
    files = Files(LocalFolder(folder))
    try:
        return bag(walk, files, execution or Limits(), advance, draws)
    finally:
        files.close()
