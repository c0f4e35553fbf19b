"""Which modules of a checkpoint engines load as one layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantconvert.families.row import FusedSet


def fused_groups(modules: Iterable[str], fused: Sequence[FusedSet]) -> list[tuple[FusedSet, tuple[str, ...]]]:
    """Each fused set that is there by its first member, with those of its members that are among `modules`."""
    known = dict.fromkeys(modules)
    leading: dict[str, list[str]] = {}
    for name in known:
        stem, dot, member = name.rpartition(".")
        if dot:
            leading.setdefault(member, []).append(stem)
    return [
        (fused_set, tuple(name for name in (f"{stem}.{member}" for member in fused_set.members) if name in known))
        for fused_set in fused
        for stem in leading.get(fused_set.members[0], ())
    ]
