"""A kernel for symmetric int4 of bfloat16 in one layout, written apart from the reference; and one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantconvert.kernels import Fast, Taken, Way
from quantconvert.layouts import Layout
from quantconvert.methods import METHODS, Noise
from quantconvert.schemes import Scheme
from quantconvert.sources import Read


class PackedInt4:
    """One call from stored rows to words."""

    name = "toy-kernel"
    off = 0

    @property
    def label(self) -> str:
        return self.name

    def __init__(self) -> None:
        self.num_calls = 0

    def scratch(self, scheme: Scheme) -> int:
        return 24

    def takes(self, way: Way) -> Taken:
        if way.method is None or way.scheme is None or way.layout is None:
            return "nothing"
        return "tiles" if self.find(way.source, way.method, way.scheme, way.layout, None) else "nothing"

    def direct(self, way: Way, files: Any, places: Any) -> Any:
        raise NotImplementedError

    def find(self, source: Read, method: str, scheme: Scheme, layout: Layout, files: Any) -> Fast | None:
        fits = (source.encoding, method, layout.name, source.dtype) == ("plain", "rtn", "compressed-tensors", "BF16")
        if (
            not fits
            or source.steps
            or scheme.num_bits != 4
            or not scheme.symmetric
            or scheme.strategy != "group"
            or source.shape[1] % 8
        ):
            return None

        def encode(raw: Mapping[str, Tensor], first: int, span: Any, noise: Noise) -> dict[str, Tensor]:
            self.num_calls += 1
            w = raw["weight"].float()
            groups = w.view(w.shape[0], -1, scheme.group_size or 1)
            bound = groups.abs().amax(-1)
            scale = (bound / 7.5).to(torch.bfloat16)
            scale[scale == 0] = 1.0
            codes = (groups / scale.float().unsqueeze(-1)).clamp(-8, 7).round().add(8 + self.off).clamp(0, 15)
            nibbles = codes.to(torch.int64).view(w.shape[0], -1, 8)
            words = sum(nibbles[..., i] << (4 * i) for i in range(8))
            reference = Noise(noise.scratch)
            METHODS["rtn"].quantize(w.clone(), scheme, torch.bfloat16, torch.bfloat16, span, reference)
            noise.noise += reference.noise
            noise.signal += reference.signal
            words = torch.where(words >= 1 << 31, words - (1 << 32), words) if isinstance(words, Tensor) else words
            return {
                "weight_packed": torch.as_tensor(words).to(torch.int32),
                "weight_scale": scale,
                "weight_shape": torch.tensor(source.shape, dtype=torch.int64),
            }

        return Fast(encode, True)


class OffByOne(PackedInt4):
    name = "toy-wrong-kernel"
    off = 1


TOY = PackedInt4()
