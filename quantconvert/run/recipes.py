"""Factors of one vector by its recipe, in torch: the reference, and what no kernel takes. Imports torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.checkpoint.ranges import Files
from quantconvert.factors import Wanted
from quantconvert.factors.recipe import (
    calm_norm,
    calm_rows,
    clamped,
    combined,
    equalize,
    joint,
    largest,
    power_of_two,
    settled,
    smooth,
)
from quantconvert.factors.sampling import sample, slab_nbytes
from quantconvert.factors.wanted import sampled_rows
from quantconvert.run.knowing import read_floats
from quantconvert.sources import Read, open_rows
from quantconvert.sources.rows import read_vector

# Told of a weight, and how many bytes of it more have been read; may raise.
Advance = Callable[[Read, int], None]


class Recipes:
    """For several threads at once. advance: called with 0 bytes, too, between blocks."""

    def __init__(self, files: Files, advance: Advance) -> None:
        self.files, self.advance = files, advance
        self._own = threading.local()

    def factors(self, wanted: Wanted) -> memoryview:
        """Float32, one a channel of the vector, as bytes."""
        work: Workspace = self._own.__dict__.setdefault("work", Workspace())
        site = wanted.site
        mu = self._before_givers(wanted, work)
        kept = [] if wanted.exact else [read for read in site.givers if len(read.shape) == 1]
        part = slice(site.start, site.start + site.width)
        vectors = [(read_vector(read, self.files)[part], site.base(read)) for read in kept]
        if site.fold.kind == "rows":
            mu = calm_rows(mu)
        elif vectors:
            mu = calm_norm(mu, vectors[0][0].float() + vectors[0][1])
        return bytes_of(settled(power_of_two(mu) if wanted.exact else mu, vectors).contiguous())

    def _before_givers(self, wanted: Wanted, work: Workspace) -> Tensor:
        """mu [C] by the site's recipe, before what gives the vector has a say."""
        site = wanted.site
        if wanted.recipe == "smooth":
            known = [read_floats(ref, self.files) for ref in wanted.maxima or wanted.importances]
            maxima_x = torch.stack(known).amax(0)
            maxima_w = largest((block for block, _ in self._blocks(wanted, work)), len(maxima_x))
            pair = [site.heads.largest(m) if site.heads else m for m in (maxima_x, maxima_w)]
            return smooth(pair[0] if wanted.maxima else pair[0].sqrt(), pair[1], wanted.alpha)
        mu = equalize(lambda: self._blocks(wanted, work), site.width, site.heads)
        if not wanted.importances:
            return clamped(mu)
        h = joint(read_floats(ref, self.files) for ref in wanted.importances)
        return combined(mu, site.heads.gathered(h) if site.heads else h)

    def _blocks(self, wanted: Wanted, work: Workspace) -> Iterator[tuple[Tensor, int | None]]:
        for driver, count in sampled_rows(wanted):
            read = driver.read
            rows = open_rows(read, self.files, work, slab_nbytes(read))
            done = 0
            for first, last in sample(read, count):
                self.advance(read, 0)
                yield rows.rows(first, last), driver.group_size
                done += last - first
            self.advance(read, read.nbytes * done // max(1, read.matrix[0]))
