"""What every method must say: how weights become codes, what that takes, and how far a code may be from its value.

Planning imports this package, so nothing here imports torch until weights are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.quantized import Quantized


# What a method has to be told of the inputs of a weight.
Needs = Literal["nothing", "importance", "moments"]


class NonFinite(Exception):
    """The block holds NaN or Inf; the caller knows the tensor's name and finds the place."""


class ScaleOverflow(Exception):
    """A scale is larger than the stored dtype can hold."""


class BadInputs(Exception):
    """What is known of a weight's inputs cannot be true of them; the text says why. The caller knows the weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What is known of the input x of a weight [O, I], in float32; None: not known.

    importance: [I], E[x_j^2]. moments: [I, I], E[x_j x_k]. Both up to a common factor.
    """

    importance: Tensor | None = None
    moments: Tensor | None = None


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
class Reach:
    """How far a value beyond the range of the codes may be, in steps: `steps`, and what is `tiny` over the scale."""

    steps: float
    tiny: float = 0.0

    def __call__(self, scale_RG: Tensor) -> Tensor:
        """For scales as float64 [R, G]."""
        return self.tiny / scale_RG + self.steps


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far what is stored may be from the source, in steps (scales); None: not judged.

    inside: of a value within the range of the codes. outside: of a value beyond it, given the scales as float64 [R, G];
    kernels judge a `Reach` alone.
    coarse, fine: the largest and the smallest scale over what the range of its values asks for. relative: the Frobenius
    norm of a weight's error over that of the weight. negative: whether scales may be.
    """

    inside: float | None = None
    outside: Callable[[Tensor], Tensor] | None = None
    coarse: float | None = None
    fine: float | None = None
    relative: float | None = None
    negative: bool = False


class Method(Protocol):
    """A way from weights to codes.

    name: as options, reports and registries say it. words: for cards and help, in a few words. needs: what `span` must
    be told of the inputs; a plan that has no source of it is refused. block_rows: how many rows a block should have
    where memory allows; 0: as many as a core's cache holds.
    """

    name: str
    words: str
    needs: Needs
    block_rows: int

    def supports(self, scheme: Scheme) -> str | None:
        """Why this method has no codes for a scheme, in a clause; None where it has."""
        ...

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> Any:
        """What must be known of the whole weight before a block of it is quantized: from its blocks (float32 [O, I]),
        read once at most, and from its inputs. None where there is nothing; `blocks` are not read where each can be
        quantized alone. Raises `NonFinite`, and `BadInputs` where `inputs` lack what the method needs.
        """
        ...

    def held(self, scheme: Scheme, columns: int) -> int:
        """Bytes that `span` takes at its peak, and its result holds, for a weight of so many columns, beside a block
        and the inputs.
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
        block's error. The result for a row does not depend on the block that it is in. Raises `NonFinite`,
        `ScaleOverflow` and `BadInputs` (inputs of another width).
        """
        ...

    def scratch(self, scheme: Scheme) -> int:
        """Bytes that `quantize` takes for each value of a block, beside the block itself."""
        ...

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        """What verification may expect of every weight that this method quantized; dtypes as safetensors tags."""
        ...
