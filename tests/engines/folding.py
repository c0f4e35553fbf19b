"""Tiny models whose factors move: random weights, random factors through the real steps, and loaded again.

Checkpoints are written as transformers saves them. Experts that it saves as one tensor are taken apart first, and put
together again after the steps, so that every weight passes through a step under the name that engines read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.buffers import Workspace, bytes_of
from quantconvert.checkpoint import LocalFolder, TensorRef, load_checkpoint
from quantconvert.families import find_family
from quantconvert.patterns import layer_of, template_of
from quantconvert.sources import Read, find_sources
from quantconvert.sources.registry import open_rows
from quantconvert.sources.rows import read_vector
from quantconvert.sources.sites import Site, find_sites
from tests.engines.families import Case, random_model

FACTORS = "factors"  # the name of a file that lies in memory only


def save_random(case: Case, folder: Path) -> Path:
    """The model in float32; matrices, biases and the gains of norms are random, and none of them small."""
    model = random_model(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name.lower() or ".ln_" in name
            if is_gain and parameter.dim() < 2 and not name.endswith("bias"):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    model.float().save_pretrained(folder)
    return folder


class Bytes:
    """The files of a folder, and the factors."""

    def __init__(self, folder: Path, factors: bytes) -> None:
        self.folder, self.factors = folder, factors

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        if file == FACTORS:
            buffer[:] = self.factors[offset : offset + len(buffer)]
            return
        with (self.folder / file).open("rb") as stored:
            stored.seek(offset)
            assert stored.readinto(buffer) == len(buffer)


@dataclass(frozen=True)
class Graph:
    """What a checkpoint's tensors are, where factors can move among them, and why some that are promised cannot."""

    folder: Path
    reads: tuple[Read, ...]
    sites: tuple[Site, ...]
    notes: tuple[str, ...]

    def kinds(self) -> dict[str, list[str]]:
        """The names of sites by their templates, relative to their layers."""
        found: dict[str, list[str]] = {}
        for site in self.sites:
            found.setdefault(template_of(site.name.removeprefix(layer_of(site.name) or "")), []).append(site.name)
        return found


def graph_of(folder: Path) -> Graph:
    checkpoint = load_checkpoint(LocalFolder(folder))
    family = find_family(checkpoint)
    errors: list[Any] = []
    sources = find_sources(checkpoint, family, lambda _: b"", errors)
    assert not errors
    sites, notes = find_sites(sources.reads, family, checkpoint)
    return Graph(folder, sources.reads, tuple(sites), tuple(notes))


def moved(graph: Graph, unmoved: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every tensor after random factors in [1/4, 4] of every site; the givers whose sites are `unmoved` stay."""
    generator, places, factors = torch.Generator().manual_seed(1), [], b""
    for site in graph.sites:
        values = torch.empty(site.width).uniform_(-2, 2, generator=generator).exp2()
        places.append(TensorRef(site.name, "F32", (site.width,), FACTORS, len(factors), 4 * site.width))
        factors += bytes(bytes_of(values))
    steps: dict[str, list[Any]] = {}
    left = set(unmoved)
    for site, place in zip(graph.sites, places, strict=True):
        kept = {read.name for read in site.givers} if site.name in left else set()
        for name, step in site.steps(place):
            if name not in kept:
                steps.setdefault(name, []).append(step)
    files = Bytes(graph.folder, factors)
    return {read.name: _values(replace(read, steps=tuple(steps.get(read.name, ()))), files) for read in graph.reads}


def _values(read: Read, files: Bytes) -> Tensor:
    """The tensor as the checkpoint stores it."""
    if len(read.shape) == 1 and (read.view.expert is not None or not read.values.dtype.startswith("F")):
        assert not read.steps
        return read_vector(read, files)
    rows = read.shape[0] if len(read.shape) > 1 else 1
    found = open_rows(read, files, Workspace(), 1 << 20).rows(0, rows).clone().view(read.shape)
    turned = read.view.transposed and read.view.expert is None
    return found.t().contiguous() if turned else found


def distance(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference of any output as a whole: the norm of it over that of the one expected."""
    pairs = zip(found, expected, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def farthest(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value of the one expected."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
