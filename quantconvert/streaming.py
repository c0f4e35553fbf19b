"""Whether a source comes by ranges as it is needed, or whole before; and the room that either takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from quantconvert.checkpoint import Repo, load_checkpoint
from quantconvert.errors import OutputError, QuantConvertError
from quantconvert.machine import can_punch, roomy_folder
from quantconvert.options import size_text
from quantconvert.planning import Plan
from quantconvert.run.dock import SLOTS
from quantconvert.run.folder import check_disk, existing_parent, usable_nbytes
from quantconvert.run.spool import Schedule, Spool, in_order, items_of_factors, items_of_tasks
from quantconvert.text import size

# Of the free room what may be taken where --disk-limit says nothing.
SHARE = 0.8
# More than this need not lie ready.
AHEAD_NBYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user said. stream: by ranges (None: where that is needed). disk_limit: bytes on the disk. ships: whether
    each shard goes to the Hub and is removed.
    """

    stream: bool | None = None
    disk_limit: int | None = None
    ships: bool = False


WHOLE = Wish()


class Way(NamedTuple):
    """How the source comes: by ranges, of which so many bytes are there at once; None: whole, or it is here."""

    limit: int | None = None
    errors: tuple[QuantConvertError, ...] = ()


def way_of(plan: Plan, repo: Repo, out: Path, wish: Wish, small: int) -> Way:
    """How the source of `plan` comes, with the refusals where there is no room.

    small: bytes that the result takes beside its shards, all that the conversion writes included.
    """
    result = small + (plan.output_nbytes if not wish.ships else _shipped_nbytes(plan, _largest(plan)))
    download = repo.download(needed(plan))
    if download is None:
        return _within(wish, result, 0, _here(out, result, wish))
    fits = not download.only_ranges and not check_disk(out, result, download)
    if not (download.only_ranges or (wish.ships or not fits if wish.stream is None else wish.stream)):
        return _within(wish, result, download.nbytes, Way(None, tuple(check_disk(out, result, download))))
    least = least_nbytes(plan, can_punch(existing_parent(out)))
    allowed = _allowed(out, wish)
    if result + least > allowed:
        return Way(None, (_too_small(plan, out, wish, (result, least, allowed), small),))
    return Way(min(allowed - result, max(least, AHEAD_NBYTES)))


def _here(out: Path, result: int, wish: Wish) -> Way:
    return Way(None, tuple(check_disk(out, result, None)))


def _within(wish: Wish, result: int, download: int, way: Way) -> Way:
    """The same, if --disk-limit allows what it takes."""
    if wish.disk_limit is None or result + download <= wish.disk_limit:
        return way
    hint = "--stream fetches the source by ranges" if download else "allow more"
    text = f"--disk-limit of {wish.disk_limit} bytes is too small: the conversion needs {result + download}"
    return Way(None, (*way.errors, OutputError(text, hint=hint)))


def needed(plan: Plan) -> tuple[str, ...]:
    """Every file of the source that is read whole."""
    files = plan.checkpoint
    return tuple(file.path for file in (*files.weight_files, *files.side_files, *files.rewritten_files))


def least_nbytes(plan: Plan, punches: bool = True) -> int:
    """Room that ranges of the source take at least. punches: whether the disk gives back parts of files."""
    tasks = (plan.tasks[index] for index in in_order(plan, range(len(plan.tasks))))
    return max(Schedule(items, punches).least() for items in (items_of_factors(plan), items_of_tasks(tasks)))


def _allowed(out: Path, wish: Wish) -> int:
    return wish.disk_limit if wish.disk_limit is not None else int(SHARE * usable_nbytes(out))


def _largest(plan: Plan) -> int:
    return max((shard.nbytes for shard in plan.shards), default=0)


def _shipped_nbytes(plan: Plan, shard: int) -> int:
    """Room for shards of at most `shard` bytes each."""
    return min(SLOTS * shard, plan.output_nbytes)


def _too_small(plan: Plan, out: Path, wish: Wish, sums: tuple[int, int, int], small: int) -> OutputError:
    result, least, allowed = sums
    place = "--disk-limit allows" if wish.disk_limit is not None else f"of the free room of `{out}` may be taken"
    hint = "free some space, choose a folder on another disk, or --disk-limit"
    if wish.ships:
        left = (allowed - least - small) // SLOTS
        if left > max(output.nbytes for task in plan.tasks for output in task.outputs):
            unit = 1_000_000 if left >= 10_000_000 else 1000
            hint = f"--max-shard-size {size_text(left // unit * unit)} fits (it changes how the result is cut)"
    what = "two of its shards" if wish.ships else "the result"
    return OutputError(
        f"too little room: {what} and what lies beside them take {size(result)}, ranges of the source at least "
        f"{size(least)}, {size(allowed)} {place}",
        hint=hint,
    )


@contextmanager
def by_ranges(repo: Repo, wish: Wish, shares: int) -> Iterator[Repo]:
    """`repo`, ready for something that reads it by `run.spool.holding`: as it is where it is on this machine, else with
    its weights coming by ranges into a temporary folder, of whose room it takes one of `shares`.
    """
    files = load_checkpoint(repo).weight_files
    paths = tuple(file.path for file in files)
    download = repo.download(paths)
    if download is None or (not download.only_ranges and (wish.stream is False or not download.nbytes)):
        repo.prepare(paths)
        yield repo
        return
    with TemporaryDirectory(dir=roomy_folder(), prefix="quantconvert-") as folder:
        limit = min(AHEAD_NBYTES, _allowed(Path(folder), wish)) // shares
        spool = Spool(repo, files, Path(folder), limit)
        try:
            yield spool
        finally:
            spool.remove()
