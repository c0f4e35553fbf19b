"""How a weight whose rows mix is cut: a part of its columns at a time, the whole of it held or in a file beside.

Pure arithmetic, the same for the plan, which counts the bytes, and for the reader, which takes them.
"""

from __future__ import annotations

from typing import NamedTuple

# float32 values of a part of what is held: few enough for a core's cache.
_PART_ELEMENTS = 1 << 18
# A part, what it is mixed into, and a copy where its rows do not lie one after the other.
_COPIES = 3
# A slab is at most a quarter of what a worker may take; of that share this much is left for tiles and parts.
_SHARE, _REST = 4, 20_000_000


class Slabs(NamedTuple):
    """columns: of a part. is_held: whether the whole lies in memory, else in a scratch file. held_nbytes, file_nbytes:
    what that takes of either.
    """

    columns: int
    is_held: bool
    held_nbytes: int
    file_nbytes: int


def slabs_of(matrix: tuple[int, int], slab_nbytes: int) -> Slabs:
    """The cut of a weight [O, I] where there is room for `slab_nbytes`; one column is the least there can be.

    Parts of what is filed are as large as that room allows: each takes a read and a write a tile.
    """
    rows, width = matrix
    whole = 4 * rows * width
    is_held = whole <= max(slab_nbytes, _SHARE * slab_nbytes - _REST)
    part = _PART_ELEMENTS if is_held else slab_nbytes // (4 * _COPIES)
    columns = max(1, min(width, part // max(1, rows)))
    return Slabs(columns, is_held, 4 * _COPIES * columns * rows + whole * is_held, whole * (not is_held))
