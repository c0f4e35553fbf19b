"""Factors by the C library are those of the recipe in torch, to the bit, at every level and whatever weights hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantconvert
from quantconvert.buffers import bytes_of, torch_dtype
from quantconvert.checkpoint import LocalFolder, TensorRef
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError
from quantconvert.events import Event, Progress
from quantconvert.factors import Driver, Wanted
from quantconvert.factors.sampling import sample
from quantconvert.families import Fold
from quantconvert.kernels import VARIABLE, Unread
from quantconvert.kernels.native.factors import Equalizer
from quantconvert.kernels.native.library import find_library
from quantconvert.run.first import first_needs_torch
from quantconvert.run.recipes import Recipes
from quantconvert.sources import Read
from quantconvert.sources.read import PLAIN, WHOLE, View
from quantconvert.sources.sites import Site
from quantconvert.sources.steps.scale import Heads
from tests.builders import llama_tensors, write_checkpoint
from tests.equalized import OPTIONS, Q, loud
from tests.snapshots import digests

TAGS = ("BF16", "F16", "F32")
LIBRARY = find_library()
LEVELS = LIBRARY.levels if LIBRARY else ()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="installed without the C kernel")

# What weights may hold: each changes normal numbers in place.
FILLS: dict[str, Callable[[Tensor, torch.Generator], Any]] = {
    "normal": lambda w, g: None,
    "zeros": lambda w, g: w.zero_(),
    "minus zeros": lambda w, g: w.zero_().neg_(),
    "constant": lambda w, g: w.fill_(-3),
    "zero columns": lambda w, g: w[:, ::3].zero_(),
    "loud columns": lambda w, g: w.mul_(torch.exp(4 * torch.randn(w.shape[1], generator=g))),
    "denormals": lambda w, g: w.mul_(torch.finfo(w.dtype).smallest_normal).mul_(0.25),
    "vast ranges": lambda w, g: w.mul_(torch.exp2(torch.randint(-120, 120, w.shape, generator=g).float())),
    "column far below": lambda w, g: w[:, 0].mul_(1e-36),
    "largest": lambda w, g: w.sign_().mul_(torch.finfo(w.dtype).max),
    "a NaN": lambda w, g: w[-1, -1].fill_(torch.nan),
    "an Inf": lambda w, g: w[0, w.shape[1] // 2].fill_(-torch.inf),
    "NaN everywhere": lambda w, g: w.fill_(torch.nan),
}


class Store:
    """Tensors in a file, as a checkpoint's are."""

    def __init__(self, folder: Path) -> None:
        self.path, self.size = folder / "weights", 5  # not aligned
        self.path.write_bytes(b"\0" * self.size)
        self.files = Files(LocalFolder(folder))

    def add(self, tensor: Tensor, tag: str, view: View = WHOLE, shape: tuple[int, ...] | None = None) -> Read:
        values = tensor.contiguous()
        name, nbytes = f"t{self.size}.weight", values.numel() * values.element_size()
        with open(self.path, "ab") as file:
            file.write(bytes_of(values))
        ref = TensorRef(name, tag, tuple(values.shape), self.path.name, self.size, nbytes)
        self.size += nbytes
        return Read(name, shape or ref.shape, tag, PLAIN, {"weight": ref}, view)


def stored(w: Tensor, view: View, experts: int = 3) -> Tensor:
    """A tensor of which `view` is `w`, and the rest is something else."""
    rows, columns = w.shape
    inner = torch.full((view.start + rows * view.step, columns), 77.0, dtype=w.dtype)
    inner[view.start :: view.step][:rows] = w
    inner = inner.t() if view.transposed else inner
    return (
        inner if view.expert is None else torch.stack([inner * (1 if i == view.expert else 9) for i in range(experts)])
    )


VIEWS = (WHOLE, View(start=3, step=2), View(expert=1), View(1, 1, 2, True), View(transposed=True))


def both(store: Store, wanted: Wanted) -> Iterator[tuple[bytes, bytes]]:
    """The reference's factors, and those of each level."""
    expected = bytes(Recipes(store.files, lambda read, nbytes: None).factors(wanted))
    assert LIBRARY is not None
    for level in range(len(LEVELS)):
        equalizer = Equalizer(LIBRARY, level)
        assert equalizer.takes(wanted)
        yield expected, bytes(equalizer.factors(wanted, store.files))


def wanted_of(
    store: Store, kind: str, drivers: list[Driver], givers: list[Read], width: int, heads: Heads | None, exact: bool
) -> Wanted:
    site = Site("M", Fold("M", (), kind), width, tuple(givers), (), 0, heads)  # type: ignore[arg-type]
    return Wanted(site, tuple(drivers), TensorRef("M", "F32", (width,), "factors", 0, 4 * width), exact)


def givers_of(store: Store, kind: str, width: int, tags: tuple[str, ...], g: torch.Generator) -> list[Read]:
    """A norm's weight and bias; of rows, a matrix and a bias. Some elements are zero, huge or tiny."""
    found = [store.add(torch.zeros(width, 4), "F32")] if kind == "rows" else []
    for tag in tags:
        vector = torch.randn(width, generator=g) * torch.exp(3 * torch.randn(width, generator=g))
        vector[torch.rand(width, generator=g) < 0.05] = 0
        found.append(store.add(vector.to(torch_dtype(tag)), tag))
    return found


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("tag", TAGS)
def test_whatever_weights_hold(tmp_path: Path, fill: str, tag: str):
    store, g = Store(tmp_path), torch.Generator().manual_seed(1)
    for columns, group in ((72, 24), (40, 8), (272, 136), (96, None), (7, None), (1, None)):
        for rows in (1, 9, 130):
            weights = [torch.randn(rows, columns, generator=g).to(torch_dtype(tag)) for _ in range(2)]
            FILLS[fill](weights[0], g)
            drivers = [Driver(store.add(w, tag), group) for w in weights]
            givers = givers_of(store, "norm", columns, (tag,), g)
            for expected, found in both(store, wanted_of(store, "norm", drivers, givers, columns, None, False)):
                assert found == expected


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("tag", TAGS)
def test_however_they_are_stored(tmp_path: Path, view: View, tag: str):
    """More rows than are looked at, too, and several weights of several sizes."""
    store, g = Store(tmp_path), torch.Generator().manual_seed(2)
    for rows in ((1, 70), (9, 2000), (2500, 3)):
        weights = [torch.randn(count, 48, generator=g).to(torch_dtype(tag)) for count in rows]
        drivers = [Driver(store.add(stored(w, view), tag, view, tuple(w.shape)), 16) for w in weights]
        for expected, found in both(store, wanted_of(store, "rows", drivers, [], 48, None, False)):
            assert found == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_takes_them(tmp_path: Path, data: st.DataObject):
    store, g = Store(tmp_path), torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    kind = data.draw(st.sampled_from(("norm", "1 + norm", "rows")))
    heads = Heads(*(data.draw(st.integers(1, 8)) for _ in range(3))) if data.draw(st.booleans()) else None
    width = heads.kv_width if heads else data.draw(st.integers(1, 40))
    columns = width * (heads.repeat if heads else 1)
    tags = tuple(data.draw(st.lists(st.sampled_from(TAGS), max_size=1 if kind == "rows" else 2)))
    fill = data.draw(st.sampled_from(list(FILLS)))
    drivers = []
    for _ in range(data.draw(st.integers(1, 4))):
        tag = data.draw(st.sampled_from(TAGS))
        w = torch.randn(data.draw(st.integers(1, 40)), columns, generator=g).to(torch_dtype(tag))
        FILLS[fill](w, g)
        sizes = [size for size in range(1, columns + 1) if columns % size == 0]
        drivers.append(Driver(store.add(w, tag), data.draw(st.sampled_from([None, *sizes]))))
    givers = givers_of(store, kind, width, tags, g)
    for expected, found in both(store, wanted_of(store, kind, drivers, givers, width, heads, data.draw(st.booleans()))):
        assert found == expected


def test_powers_of_two_divide_at_the_square_root(tmp_path: Path):
    """Of one row, the factors are nearly its numbers over the largest: here every number near the root of a half."""
    store = Store(tmp_path)
    near = torch.arange(0x3F3504F3 - 50, 0x3F3504F3 + 50, dtype=torch.int32).view(torch.float32)
    drivers = [Driver(store.add(torch.cat((near, torch.ones(201)))[None], "F32"), None)]
    givers = givers_of(store, "rows", 301, (), torch.Generator())
    for expected, found in both(store, wanted_of(store, "rows", drivers, givers, 301, None, True)):
        assert found == expected
        values = memoryview(found).cast("f").tolist()
        assert values[:45] + values[55:] == [0.5] * 45 + [1.0] * 246


@pytest.mark.parametrize("gain", [0.0, 1e30, torch.inf, torch.nan], ids=str)
def test_gains_that_have_no_room(tmp_path: Path, gain: float):
    store, g = Store(tmp_path), torch.Generator().manual_seed(3)
    for tags in (("F32",), ("BF16", "F16"), ("F16", "F32"), ("F32", "BF16")):
        givers = givers_of(store, "norm", 64, tags, g)
        vector = torch.ones(64).to(torch_dtype(tags[0]))
        vector[5] = gain
        givers[0] = store.add(vector, tags[0])
        drivers = [Driver(store.add(torch.randn(20, 64, generator=g), "F32"), 32)]
        for expected, found in both(store, wanted_of(store, "norm", drivers, givers, 64, None, False)):
            assert found == expected


def test_a_part_of_a_bias_that_experts_share(tmp_path: Path):
    """Of an expert's gate and up, one after the other, in which the factors begin behind the gate."""
    store, g = Store(tmp_path), torch.Generator().manual_seed(4)
    bias = store.add(torch.randn(4, 96, generator=g).bfloat16(), "BF16", View(2, 1, 2), (48,))
    matrix = store.add(torch.zeros(48, 4), "F32")
    drivers = [Driver(store.add(torch.randn(20, 24, generator=g), "F32"), 8)]
    site = Site("M", Fold("M", (), "rows"), 24, (matrix, bias), (), 24)
    wanted = Wanted(site, tuple(drivers), TensorRef("M", "F32", (24,), "factors", 0, 96))
    for expected, found in both(store, wanted):
        assert found == expected


def test_a_file_that_ends_is_not_read(tmp_path: Path):
    store = Store(tmp_path)
    reads = [store.add(torch.ones(20, 8), "F32") for _ in range(2)]
    wanted = wanted_of(store, "norm", [Driver(read, 8) for read in reads], [], 8, None, False)
    with open(store.path, "r+b") as file:
        file.truncate(store.size - 100)
    assert LIBRARY is not None
    with pytest.raises(Unread) as caught:
        Equalizer(LIBRARY, 0).factors(wanted, store.files)
    assert caught.value.args[0] is reads[1]


# Conversions.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("loud") / "in", loud())


def progress(source: Path, out: Path, **options: Any) -> list[tuple[str, int]]:
    events: list[Event] = []
    quantconvert.convert(source, out, report=events.append, **OPTIONS, **options)
    return sorted((event.name, event.nbytes) for event in events if isinstance(event, Progress) and event.nbytes)


def test_conversions_are_the_same_and_tell_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    native = progress(source, tmp_path / "a", workers=4)
    monkeypatch.setenv(VARIABLE, "torch")
    first = progress(source, tmp_path / "b", workers=1)
    names = [name for name, _ in first]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [name for name, _ in native if name == Q] == [name for name in names if name == Q]
    assert sum(nbytes for _, nbytes in native) == sum(nbytes for _, nbytes in first)


@pytest.mark.skipif(LIBRARY is None, reason="the C kernel is not here")
def test_what_needs_torch_is_known_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    plan = quantconvert.plan(source, equalize=True)
    assert plan.factors is not None
    assert not first_needs_torch(plan)
    assert not first_needs_torch(quantconvert.plan(source, equalize=False))
    assert first_needs_torch(quantconvert.plan(source, method="search"))
    assert first_needs_torch(quantconvert.plan(source, scheme="W8A8", smooth=0.5))
    monkeypatch.setenv(VARIABLE, "torch")
    assert first_needs_torch(plan)
    assert not first_needs_torch(quantconvert.plan(source, equalize=False))


def test_a_source_that_becomes_shorter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_checkpoint(tmp_path / "in", llama_tensors())
    plan, file = quantconvert.plan(path, equalize=True), path / "model.safetensors"
    assert plan.factors is not None
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    from quantconvert.run.first import first_pass

    with pytest.raises(CheckpointError, match=r"`model\.safetensors` became shorter while it was read"):
        first_pass(plan, LocalFolder(path), tmp_path, False, lambda event: None)


def test_a_sample_is_evenly_spaced():
    def weight_of(rows: int) -> Read:
        ref = TensorRef("M.weight", "F32", (rows, 8), "f", 0, 32 * rows)
        return Read(ref.name, ref.shape, "F32", PLAIN, {"weight": ref})

    assert list(sample(weight_of(100), 20)) == [(0, 8), (46, 54), (92, 100)]
    assert list(sample(weight_of(100), 1)) == [(0, 1)]
    assert list(sample(weight_of(9000), 9000)) == [(0, 4096), (4096, 8192), (8192, 9000)]
    for count in (1, 20, 97, 100):
        found = sample(weight_of(100), count)
        assert count <= found.count == sum(last - first for first, last in found) < count + 8
