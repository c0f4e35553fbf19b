"""What tests of methods with inputs share: schemes, hostile groups, cuts into blocks, methods that were told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from quantconvert.layouts import LAYOUTS, Stored
from quantconvert.methods import Inputs, Method, Needs, Noise
from quantconvert.methods.feedback import Feedback
from quantconvert.methods.gptq import Gptq
from quantconvert.methods.search import Search
from quantconvert.quantized import Quantized, dequantize
from quantconvert.schemes import Scheme
from quantconvert.verification.weights import Errors, range_problem

SCHEMES = [
    Scheme(bits, symmetric, strategy, 32 if strategy == "group" else None)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel")
]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def hostile(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Blocks [9, 64] with zeros, one sign, denormals, an outlier and the largest values."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(9, 64, generator=generator) * 0.02
    yield "zeros", torch.zeros(9, 64, dtype=dtype)
    yield "a group of zeros", torch.cat((torch.zeros(9, 32), w[:, :32]), 1).to(dtype)
    yield "one sign", w.abs().to(dtype)
    yield "constant", torch.full((9, 64), -0.37, dtype=dtype)
    yield "denormal", torch.full((9, 64), info.smallest_normal * info.eps * 5, dtype=dtype)
    outlier = w.to(dtype)
    outlier[3, 5] = info.max / 2
    yield "outlier", outlier
    extremes = w.to(dtype)
    extremes[:, 0], extremes[:, 1] = info.max, -info.max
    yield "extremes", extremes


def run(method: Method, w: Tensor, scheme: Scheme, inputs: Inputs, scale_dtype: torch.dtype | None = None) -> Quantized:
    span = method.span(iter(()), scheme, inputs)
    return method.quantize(w.float().clone(), scheme, w.dtype, scale_dtype or w.dtype, span)


def assert_same(one_block: Quantized, blocks: list[Quantized]) -> None:
    """Codes, scales and zero points of a weight, whole and in blocks, to the bit."""
    assert torch.equal(torch.cat([q.codes for q in blocks]), one_block.codes)
    assert torch.equal(torch.cat([q.scale for q in blocks]), one_block.scale)
    assert torch.equal(torch.cat([q.zero_points() for q in blocks]), one_block.zero_points())


def check_blocks(method: Method, w: Tensor, scheme: Scheme, inputs: Inputs) -> None:
    """Cuts of any size, and two threads, give the same."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        span = method.span(iter(()), scheme, inputs)
        whole = method.quantize(w.float().clone(), scheme, w.dtype, w.dtype, span)
        for size, count in ((1, 1), (3, 1), (8, 2), (len(w) - 1, 2), (len(w), 2)):
            torch.set_num_threads(count)
            parts = [method.quantize(p.float().clone(), scheme, w.dtype, w.dtype, span) for p in w.split(size)]
            assert_same(whole, parts)
    finally:
        torch.set_num_threads(threads)


def check_noise(method: Method, w: Tensor, scheme: Scheme, inputs: Inputs) -> None:
    """What the method says of its error is its error, and asking changes nothing."""
    span, noise = method.span(iter(()), scheme, inputs), Noise(lambda shape: torch.empty(shape))
    q = method.quantize(w.float().clone(), scheme, w.dtype, w.dtype, span, noise)
    assert_same(run(method, w, scheme, inputs), [q])
    expected = (dequantize(q).double() - w.double()).square().sum()
    assert noise.noise == pytest.approx(float(expected), rel=1e-4)
    assert noise.signal == pytest.approx(float(w.double().square().sum()), rel=1e-4)


def problem(
    method: Method, w: Tensor, q: Quantized, scheme: Scheme, tag: str, scale_tag: str | None = None
) -> str | None:
    """What verification says of a weight."""
    tags = (tag, scale_tag or tag)
    tolerance = method.tolerance(scheme, *tags)
    errors = Errors(scheme, tolerance, tags)
    errors.add(w.float().clone(), dequantize(q), q)
    return range_problem(q, tolerance) or errors.problem(judge_scales=True)


def check_layouts(method: Method, w: Tensor, scheme: Scheme, inputs: Inputs) -> int:
    """Every layout that can hold the scheme gives back what it was given; returns how many those are."""
    count = 0
    for layout in LAYOUTS.values():
        if layout.problems(scheme, w.shape, "M"):
            continue
        shape = (w.shape[0], w.shape[1])
        q = run(method, w, scheme, inputs, DTYPES[layout.scale_dtype("BF16")])
        offset = 1 if layout.name == "gptq" and scheme.symmetric else 0
        back = layout.decode(layout.encode(q, scheme, shape), Stored("M", scheme, shape, {}, offset), shape[0])
        assert_same(q, [back])
        count += 1
    return count


def swapped(q: Quantized) -> Quantized:
    """The two codes of the pair that differs most, exchanged."""
    pairs = q.codes.clone().view(-1, 2)
    at = int((pairs[:, 0].int() - pairs[:, 1].int()).abs().argmax())
    pairs[at] = pairs[at].flip(0)
    return Quantized(pairs.view(q.codes.shape), q.scale, q.offset, q.number)


def scaled(q: Quantized, factor: float) -> Quantized:
    """One scale times a factor."""
    scale = q.scale.clone()
    scale[1, 0] *= factor
    return Quantized(q.codes, scale, q.offset, q.number)


def importances(columns: int) -> Tensor:
    """Of a few loud columns and many quiet ones."""
    return torch.exp(2 * torch.randn(columns, generator=torch.Generator().manual_seed(columns)))


def moments(columns: int, rank: int | None = None) -> Tensor:
    """Of inputs that go together: `rank` directions, and a little of every other."""
    generator = torch.Generator().manual_seed(columns + 1)
    rank = rank or max(1, columns // 8)
    mixed = torch.randn(2 * columns, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    x = (mixed + 0.3 * torch.randn(2 * columns, columns, generator=generator)) * importances(columns).pow(0.25)
    return x.t() @ x / len(x)


class ToldSearch(Search):
    """`search`, with importances of its own for any width."""

    name = "told-search"
    needs: Needs = "nothing"

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> Tensor:
        return super().span(blocks, scheme, Inputs(importances(next(iter(blocks)).shape[1])))


class ToldGptq(Gptq):
    """`gptq`, with moments of its own for any width."""

    name = "told-gptq"
    needs: Needs = "nothing"

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> Feedback:
        return super().span(blocks, scheme, Inputs(None, moments(next(iter(blocks)).shape[1])))
