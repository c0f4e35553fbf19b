"""Whatever kernel is registered gives what the three calls give, to the bit: blocks and noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantconvert.buffers import torch_dtype
from quantconvert.checkpoint import TensorRef
from quantconvert.kernels import KERNELS, Kernel
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import METHODS, Noise
from quantconvert.schemes import Scheme
from quantconvert.sources import as_stored
from tests.joints.kernel import OffByOne, PackedInt4

SCHEMES = [
    Scheme(bits, symmetric, strategy, 32 if strategy == "group" else None)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel")
]


def awkward(dtype: torch.dtype) -> Iterator[Tensor]:
    """Blocks with zeros, one sign, ties between codes, denormals, and values near the largest."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(24, 64, generator=generator)
    yield w.to(dtype)
    yield torch.zeros(8, 64, dtype=dtype)
    yield w.abs().to(dtype)
    yield (torch.arange(64).float().expand(8, 64) / 2 - 16).to(dtype).contiguous()
    tiny = 1e-37 if dtype != torch.float16 else 1e-7
    yield (w * tiny).to(dtype)
    yield (w * 2e4).clamp(-6e4, 6e4).to(dtype)


def compare(kernel: Kernel) -> int:
    """Run a kernel over everything that it takes, beside the reference; returns how many blocks that were."""
    count = 0
    for tag in ("BF16", "F16", "F32"):
        for w in awkward(torch_dtype(tag)):
            source = as_stored(TensorRef("M.weight", tag, tuple(w.shape), "f", 0, w.numel() * w.element_size()))
            for scheme in SCHEMES:
                for layout in LAYOUTS.values():
                    for method in METHODS.values():
                        if layout.problems(scheme, w.shape, "M"):
                            continue
                        encode = kernel.find("plain", method.name, scheme, layout.name, source)
                        if encode is not None:
                            count += 1
                            check(encode, method, layout, scheme, source, w, tag)
    return count


def check(encode: Any, method: Any, layout: Any, scheme: Scheme, source: Any, w: Tensor, tag: str) -> None:
    dtype, scale_dtype = torch_dtype(tag), torch_dtype(layout.scale_dtype(tag))
    slow, fast = Noise(lambda shape: torch.empty(shape)), Noise(lambda shape: torch.empty(shape))
    quantized = method.quantize(w.float(), scheme, dtype, scale_dtype, None, slow)
    expected = layout.encode(quantized, scheme, source.shape)
    found = encode({"weight": w}, None, fast)
    assert set(found) == set(expected)
    for suffix, block in expected.items():
        assert torch.equal(found[suffix], block), (suffix, scheme.label, layout.name)
    assert (fast.noise, fast.signal) == (slow.noise, slow.signal)


@pytest.mark.parametrize("kernel", [*KERNELS.values(), PackedInt4()], ids=lambda kernel: kernel.name)
def test_a_kernel_equals_the_reference(kernel: Kernel):
    assert compare(kernel) > 0


def test_a_wrong_kernel_is_found():
    with pytest.raises(AssertionError):
        compare(OffByOne())
