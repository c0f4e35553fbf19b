"""Scales of blocks, where engines load several projections as one: their rows must be whole blocks.

As vLLM's `validate_fp8_block_shape` (`layers/quantization/utils/fp8_utils.py`): the last of a merged set alone may end
in a partial block; of experts none may, in neither dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.patterns import experts_of
from quantconvert.planning.decision import Decision

# Positions of the members of each set that is loaded as one, and its name.
Groups = Sequence[tuple[str, Sequence[int]]]


def keep_unaligned(decisions: list[Decision], groups: Groups) -> list[Decision]:
    """Keep what blocks do not fit, with all that is loaded with it."""
    for name, members in groups:
        _keep(decisions, members, name, decisions[members[-1]] if len(members) > 1 else None)
    experts: dict[str, list[int]] = {}
    for i, d in enumerate(decisions):
        stem = experts_of(d.module) if d.is_expert else None
        if stem:
            experts.setdefault(stem, []).append(i)
    for stem, members in experts.items():
        _keep(decisions, members, f"{stem.rpartition('.')[2]} of one layer", None)
    return decisions


def _keep(decisions: list[Decision], members: Sequence[int], name: str, last: Decision | None) -> None:
    """Keep all members where one does not fit. last: the member that may end in a partial block, if one may."""
    for i in members:
        d = decisions[i]
        block = d.request.block if d.request else None
        if block is None:
            continue
        rows, columns = d.ref.shape
        whole_rows, whole_columns = rows % block[0] == 0, columns % block[1] == 0
        fits = (whole_rows and whole_columns) if d.is_expert else whole_rows or d is last
        if not fits:
            why = f"{[rows, columns]}, loaded with others as {name}, is not in whole blocks of {block[0]} x {block[1]}"
            for k in members:
                if decisions[k].request:
                    decisions[k] = decisions[k].kept("unaligned", why)
            return
