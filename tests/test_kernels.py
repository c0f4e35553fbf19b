"""Whatever kernel is registered gives what the calls of method and layout give, to the bit: blocks and noise."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantconvert
from quantconvert.buffers import bytes_of, torch_dtype
from quantconvert.checkpoint import TensorRef
from quantconvert.errors import UsageError
from quantconvert.kernels import VARIABLE, Kernel, kernel_label
from quantconvert.kernels.native import Native
from quantconvert.kernels.native.library import find_library
from quantconvert.layouts import LAYOUTS, Layout
from quantconvert.methods import METHODS, Inputs, Noise, NonFinite, ScaleOverflow
from quantconvert.schemes import Scheme
from quantconvert.sources import Read, as_stored
from quantconvert.sources.steps.scale import Scale
from tests.builders import write_checkpoint
from tests.joints.kernel import OffByOne, PackedInt4
from tests.snapshots import digests

TAGS = ("BF16", "F16", "F32")
LIBRARY = find_library()
WHOLE = [layout for layout in LAYOUTS.values() if layout.packing(Scheme(4, True, "group", 32))]
LEVELS = LIBRARY.levels if LIBRARY else ()
native = pytest.mark.skipif(LIBRARY is None, reason="installed without the C kernel")


def schemes(columns: int) -> Iterator[Scheme]:
    """Every kind that fits a width, W8A8 too."""
    sizes = [size for size in (8, 16, 24, 32, 128, 136) if columns % size == 0]
    for bits in (4, 8):
        for symmetric in (True, False):
            yield from (Scheme(bits, symmetric, "group", size) for size in sizes)
            yield Scheme(bits, symmetric, "channel")
            yield Scheme(bits, symmetric, "tensor")
    yield Scheme(8, True, "channel", activations=True)


def bit_patterns(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite numbers of every size: random bits."""
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(kind)
    w = torch.randint(info.min, info.max, shape, generator=generator).to(kind).view(dtype)
    return torch.where(torch.isfinite(w), w, torch.zeros((), dtype=dtype))


def kinds(dtype: torch.dtype, rows: int, columns: int) -> Iterator[Tensor]:
    """Zeros, one sign, ties between codes, denormals, outliers, and all bits that are finite."""
    generator = torch.Generator().manual_seed(3)
    w, info = torch.randn(rows, columns, generator=generator), torch.finfo(dtype)
    yield w.to(dtype)
    yield torch.zeros(rows, columns, dtype=dtype)
    yield -torch.zeros(rows, columns, dtype=dtype)
    yield w.abs().to(dtype)
    yield -w.abs().to(dtype)
    yield torch.full((rows, columns), -3.0, dtype=dtype)
    yield (torch.arange(columns).float().expand(rows, columns) / 2 - 16).to(dtype)
    yield (w * info.tiny).to(dtype)
    yield (w * info.smallest_normal * info.eps * 9).to(dtype)
    yield torch.where(w > 2, w * 50, w).to(dtype)
    yield (w * 2e4).clamp(-6e4, 6e4).to(dtype)
    yield bit_patterns((rows, columns), dtype, generator)


def awkward(dtype: torch.dtype, rows: int, columns: int) -> Iterator[Tensor]:
    """All kinds as one block, each in a row at least, and values near the largest."""
    few = list(kinds(dtype, -(-rows // 12), columns))
    yield torch.cat(few[:-1])[:rows].contiguous()
    yield torch.cat(few[::-1])[:rows].contiguous()
    generator = torch.Generator().manual_seed(4)
    w, info = torch.randn(rows, columns, generator=generator), torch.finfo(dtype)
    yield (w.double() * info.max / 9).to(dtype)
    yield torch.where(w > 0, info.max, info.min).to(dtype)


class Memory:
    """Files that hold one tensor of factors each."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, values: Tensor) -> TensorRef:
        name = f"factors {len(self.tensors)}"
        self.tensors[name] = values
        return TensorRef(name, "F32", tuple(values.shape), name, 0, 4 * values.numel())

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        buffer[:] = bytes_of(self.tensors[file])[offset : offset + len(buffer)]


def source_of(w: Tensor, tag: str, steps: tuple[Scale, ...] = ()) -> Read:
    stored = {dtype: t for t in TAGS for dtype in (torch_dtype(t),)}[w.dtype]
    ref = TensorRef("M.weight", stored, tuple(w.shape), "f", 0, w.numel() * w.element_size())
    read = as_stored(ref)
    return Read(read.name, read.shape, tag, read.encoding if stored == tag else "other", read.refs, steps=steps)


def outcome(call: Any) -> Any:
    """What a call gives, or which exception of methods it raises."""
    try:
        return call()
    except (NonFinite, ScaleOverflow) as error:
        return type(error)


def check(kernel: Kernel, w: Tensor, tag: str, scheme: Scheme, layout: Layout, **steps: Any) -> bool:
    """Compare one block with the reference; False where the kernel does not take it. w: as stored, or float32."""
    files, scales, importance = steps.get("files", Memory()), steps.get("scales", ()), steps.get("importance")
    source = source_of(w, tag, scales)
    if layout.problems(scheme, w.shape, "M"):
        return False
    method = METHODS["rtn" if importance is None else "search"]
    fast = kernel.find(source, method.name, scheme, layout, files)
    if fast is None or method.supports(scheme):
        return False
    dtype, scale_dtype = torch_dtype(tag), torch_dtype(layout.scale_dtype(tag))
    values, first = w.float().clone(), steps.get("first", 0)
    for scale in scales:
        scale.open(files)(values, first, (0, w.shape[1]))
    span = outcome(lambda: method.span(iter((values.clone(),)), scheme, Inputs(importance)))
    if span is NonFinite:
        return True
    slow, quick = Noise(torch.empty), Noise(torch.empty)

    def reference() -> dict[str, Tensor]:
        return layout.encode(method.quantize(values, scheme, dtype, scale_dtype, span, slow), scheme, source.shape)

    expected = outcome(reference)
    found = outcome(lambda: fast.encode({"weight": w.clone(memory_format=torch.preserve_format)}, first, span, quick))
    if not isinstance(expected, dict):
        assert found is expected
        return True
    assert set(found) == set(expected)
    for suffix, block in expected.items():
        where = (suffix, scheme.label, layout.name, tag)
        assert (found[suffix].dtype, found[suffix].shape) == (block.dtype, block.shape), where
        assert torch.equal(*(tensor.reshape(-1).clone().view(torch.uint8) for tensor in (found[suffix], block))), where
    assert (quick.noise, quick.signal) == (slow.noise, slow.signal), (scheme.label, layout.name, tag)
    return True


def compare(kernel: Kernel, rows: int = 24, columns: int = 64) -> int:
    """Run a kernel over everything that it takes, beside the reference; returns how many blocks that were."""
    count = 0
    for tag in TAGS:
        for w in awkward(torch_dtype(tag), rows, columns):
            for scheme in schemes(columns):
                count += sum(check(kernel, w, tag, scheme, layout) for layout in WHOLE)
    return count


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("shape", [(24, 64), (16, 272), (13, 40), (14, 1), (12, 137)], ids=str)
@native
def test_the_c_kernel_equals_the_reference(level: int, shape: tuple[int, int]):
    assert compare(Native(LIBRARY, level), *shape) > 100


@native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("shape", [(24, 64), (13, 40), (12, 137), (8, 256), (8, 272)], ids=str)
def test_the_search_equals_the_reference(level: int, shape: tuple[int, int]):
    """With importances of many sizes, equal ones (ties), zeros among them, and none but zeros."""
    generator, count = torch.Generator().manual_seed(6), 0
    wide = torch.rand(shape[1], generator=generator).mul_(20).exp_()
    importances = (wide, torch.ones(shape[1]), torch.where(wide > 1e4, wide, 0.0), torch.zeros(shape[1]))
    for tag in TAGS:
        for i, w in enumerate(awkward(torch_dtype(tag), *shape)):
            for scheme in schemes(shape[1]):
                for layout in WHOLE:
                    importance = importances[(i + count) % len(importances)]
                    count += check(Native(LIBRARY, level), w, tag, scheme, layout, importance=importance)
    assert count > 100


@native
@pytest.mark.parametrize("tag", TAGS)
def test_each_kind_alone(tag: str):
    """One block each: what one row holds decides a scale of a whole tensor, and whether there is one."""
    for w in kinds(torch_dtype(tag), 8, 32):
        for scheme in schemes(32):
            for layout in WHOLE:
                check(Native(LIBRARY, len(LEVELS) - 1), w, tag, scheme, layout)


def test_a_toy_kernel_equals_the_reference():
    assert compare(PackedInt4()) > 0


def test_a_wrong_kernel_is_found():
    with pytest.raises(AssertionError):
        compare(OffByOne())


@native
def test_the_c_kernel_takes_every_layout_and_dtype():
    w, scheme = torch.randn(16, 128), Scheme(4, True, "group", 32)
    for layout in WHOLE:
        for tag in TAGS:
            assert check(Native(LIBRARY), w.to(torch_dtype(tag)), tag, scheme, layout), (layout.name, tag)
            assert check(Native(LIBRARY), w, tag, scheme, layout), (layout.name, tag)


@native
@pytest.mark.parametrize("scale_tag", ["BF16", "F16"])
def test_scales_halfway_between_two_numbers(scale_tag: str):
    """Of nearly every exponent, and halfway to what is too large."""
    steps = torch.arange(1, 0x7BFF if scale_tag == "F16" else 0x7D00, 7, dtype=torch.int16)
    numbers, following = (bits.view(torch_dtype(scale_tag)).double() for bits in (steps, steps + 1))
    halfway = ((numbers + following) / 2 * 7.5).float()
    w = torch.stack((halfway, -halfway / 3, halfway / 5, halfway * 0), 1)
    w = w[: len(w) // 8 * 8].repeat(1, 2).contiguous()
    layout, scheme = LAYOUTS["gptq" if scale_tag == "F16" else "rtn"], Scheme(4, True, "channel")
    assert check(Native(LIBRARY), w, "F32" if scale_tag == "F16" else "BF16", scheme, layout)
    if scale_tag == "F16":
        largest = torch.tensor([65504.0, 65519.0, 65520.0]) * 7.5
        for row in largest.view(3, 1, 1).expand(3, 8, 8):
            assert check(Native(LIBRARY), row.contiguous(), "F32", scheme, layout)


@native
@pytest.mark.parametrize("tag", TAGS)
def test_rows_of_other_encodings_come_as_float32(tag: str):
    """Their scales are rounded to the weight's own dtype, which does not hold all of them."""
    for w in awkward(torch.float32, 16, 128):
        for scheme in schemes(128):
            for layout in WHOLE:
                check(Native(LIBRARY), w, tag, scheme, layout)


@native
@pytest.mark.parametrize("place", [(0, 0), (5, 70), (15, 127)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tag", TAGS)
def test_what_is_not_finite_is_found(tag: str, value: float, place: tuple[int, int]):
    """After a scale that overflows, too."""
    w = torch.randn(16, 128).to(torch_dtype(tag))
    w[0, :4] = torch.finfo(w.dtype).max
    w[place] = value
    for scheme in (s for s in schemes(128) if s.strategy != "tensor"):
        for layout in WHOLE:
            source = source_of(w, tag)
            fast = Native(LIBRARY).find(source, "rtn", scheme, layout, Memory())
            if fast is not None and not layout.problems(scheme, w.shape, "M"):
                with pytest.raises(NonFinite):
                    fast.encode({"weight": w}, 0, None, Noise(torch.empty))


@native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("tag", TAGS)
def test_steps_are_taken_in_their_order(tag: str, level: int):
    generator = torch.Generator().manual_seed(5)
    files = Memory()

    def factors(count: int) -> Tensor:
        return torch.rand(count, generator=generator) * 3 + 0.1

    w = torch.randn(16, 136, generator=generator).to(torch_dtype(tag))
    columns, rows = Scale(files.add(factors(136)), "columns"), Scale(files.add(factors(100)), "rows", start=37)
    again = Scale(files.add(factors(136)), "columns")
    for scales in ((columns,), (columns, rows), (rows, columns, again)):
        for first in (0, 32):
            for scheme in schemes(136):
                for layout in WHOLE:
                    check(Native(LIBRARY, level), w, tag, scheme, layout, files=files, scales=scales, first=first)
    last = Native(LIBRARY).find(source_of(w, tag, (columns,)), "rtn", Scheme(4, True, "channel"), LAYOUTS["rtn"], files)
    assert last is not None
    assert last.stored


@native
@pytest.mark.parametrize("tag", TAGS)
def test_views_of_stored_tensors(tag: str):
    """Every other row, and rows of a matrix that is stored transposed."""
    w = torch.randn(32, 128).to(torch_dtype(tag))
    for view in (w[::2], torch.randn(128, 16).to(w.dtype).t()):
        for layout in WHOLE:
            assert check(Native(LIBRARY), view, tag, Scheme(4, False, "group", 32), layout)


FLOATS = {"BF16": ("<H", 16), "F16": ("<H", 16), "F32": ("<I", 32)}


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, str, Scheme]:
    """Any bits whatever, of any kind."""
    tag, columns = draw(st.sampled_from(TAGS)), draw(st.sampled_from((8, 24, 64)))
    form, bits = FLOATS[tag]
    rows = draw(st.integers(1, 9))
    few = draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=12))
    numbers = draw(st.lists(st.sampled_from(few), min_size=rows * columns, max_size=rows * columns))
    raw = bytearray().join(struct.pack(form, number) for number in numbers)
    w = torch.frombuffer(raw, dtype=torch_dtype(tag)).view(rows, columns)
    return w, tag, draw(st.sampled_from(list(schemes(columns))))


@native
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(blocks())
def test_any_bits(block: tuple[Tensor, str, Scheme]):
    w, tag, scheme = block
    for layout in WHOLE:
        check(Native(LIBRARY), w, tag, scheme, layout)


def test_a_choice_that_is_not_to_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_checkpoint(tmp_path / "in")
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match=f"{VARIABLE}: expected one of torch.*got `fast`"):
        quantconvert.plan(source)
    with pytest.raises(UsageError, match="got `fast`"):
        kernel_label()


@native
def test_a_choice_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, folders = write_checkpoint(tmp_path / "in"), {}
    for word in ("torch", "native", "", *LEVELS):
        monkeypatch.setenv(VARIABLE, word)
        label = "torch" if word == "torch" else f"native ({word if word in LEVELS else LEVELS[-1]})"
        assert kernel_label() == label
        quantconvert.convert(source, tmp_path / f"out {word}", group_size=32)
        folders[word] = digests(tmp_path / f"out {word}")
    assert all(folder == folders["torch"] for folder in folders.values())
