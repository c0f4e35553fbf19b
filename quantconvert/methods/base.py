"""What every method must say: how weights become codes, what that takes, and how far a code may be from its value.

Planning imports this package, so nothing here imports torch until weights are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.quantized import Quantized


class NonFinite(Exception):
    """The block holds NaN or Inf; the caller knows the tensor's name and finds the place."""


class ScaleOverflow(Exception):
    """A scale is larger than the stored dtype can hold."""


@dataclass(slots=True)
class Noise:
    """What quantization took from a weight: sums of squares of the difference and of the weight, over its blocks.

    `scratch` gives a float32 buffer of a shape. The sums are those of the same blocks in the same order, whatever the
    number of workers, so that they are the same every time.
    """

    scratch: Callable[[tuple[int, ...]], Tensor]
    noise: float = 0.0
    signal: float = 0.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far what is stored may be from the source, in steps (scales); None: not judged.

    inside: of a value within the range of the codes. outside: of a value beyond it, given the scales as float64 [R, G].
    coarse: the largest scale over what the range of its values asks for. relative: the Frobenius norm of a weight's
    error over that of the weight. negative: whether scales may be.
    """

    inside: float | None = None
    outside: Callable[[Tensor], Tensor] | None = None
    coarse: float | None = None
    relative: float | None = None
    negative: bool = False


class Method(Protocol):
    """A way from weights to codes.

    name: as options, reports and registries say it. words: for cards and help, in a few words.
    """

    name: str
    words: str

    def span(self, blocks: Iterable[Tensor], scheme: Scheme) -> Any:
        """What one pass over the whole weight must find first, from its blocks (float32 [O, I]); None without reading
        any where each block can be quantized alone. Raises `NonFinite`.
        """
        ...

    def quantize(
        self,
        w_OI: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        span: Any = None,
        noise: Noise | None = None,
    ) -> Quantized:
        """A block of whole rows, float32 [O, I], as codes; the block is overwritten.

        dtype: the weight's own. scale_dtype: in which scales are stored. span: what `span` found. noise: takes in the
        block's error. The result for a row does not depend on the block that it is in. Raises `NonFinite` and
        `ScaleOverflow`.
        """
        ...

    def scratch(self, scheme: Scheme) -> int:
        """Bytes that `quantize` takes for each value of a block, beside the block itself."""
        ...

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        """What verification may expect of every weight that this method quantized; dtypes as safetensors tags."""
        ...
