"""The step that moves factors from the columns of what reads a vector to what gives it.

x_j w_ij = (x_j mu_j) (w_ij / mu_j): exact but for float32's rounding. The factors lie in a file of their own, which the
first pass of a conversion writes before any weight is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from quantconvert.checkpoint import TensorRef
from quantconvert.frozen import frozen
from quantconvert.sources.steps.base import Change, Step

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.sources.rows import Files

Way = Literal["columns", "rows", "vector", "1 + vector"]


class Heads(NamedTuple):
    """Columns as query heads of `head_dim`, `repeat` of which share each of `shared` key-value heads."""

    head_dim: int
    repeat: int
    shared: int

    @property
    def kv_width(self) -> int:
        return self.head_dim * self.shared

    def spread(self, factors: Tensor) -> Tensor:
        """A factor a key-value channel [kv_width] as one a column [kv_width * repeat]."""
        return factors.view(self.shared, 1, self.head_dim).expand(-1, self.repeat, -1).reshape(-1)

    def spread_bytes(self, factors: memoryview) -> memoryview:
        """The same of the bytes of float32."""
        head = 4 * self.head_dim
        heads = (factors[i * head : (i + 1) * head] for i in range(self.shared) for _ in range(self.repeat))
        return memoryview(bytearray().join(heads))

    def gathered(self, values: Tensor) -> Tensor:
        """One value a column as the mean of those that share a key-value channel [kv_width], added in order."""
        first, *others = values.view(self.shared, self.repeat, self.head_dim).unbind(1)
        total = first.clone()
        for other in others:
            total += other
        return (total / self.repeat).reshape(-1)

    def largest(self, values: Tensor) -> Tensor:
        """The same, the largest of them."""
        return values.view(self.shared, self.repeat, self.head_dim).amax(1).reshape(-1)


@frozen
class Scale(Step):
    """Factors float32 [width] that `factors` places: columns are divided by them; rows, or the elements of a vector,
    from `start` on are multiplied. `1 + vector`: of a norm that stores w and multiplies by 1 + w.
    """

    factors: TensorRef
    way: Way
    start: int = 0
    heads: Heads | None = None

    kind: ClassVar[str] = "scale"

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        return self.factors.nbytes * (1 + (self.heads.repeat if self.heads else 0))

    def open(self, files: Files) -> Change:
        return self._change(self.read(files))

    def floats(self, files: Files) -> memoryview:
        """The factors as the bytes of float32; one a column where heads share them."""
        raw = memoryview(bytearray(self.factors.nbytes))
        files.read_into(self.factors.file, raw, self.factors.offset)
        return raw if self.heads is None else self.heads.spread_bytes(raw)

    def read(self, files: Files) -> Tensor:
        """The same as a tensor."""
        import torch

        return torch.frombuffer(self.floats(files), dtype=torch.float32)

    def _change(self, factors: Tensor) -> Change:
        start = self.start

        def columns(w_OI: Tensor, first: int, part: tuple[int, int]) -> None:
            w_OI.div_(factors[slice(*part)])

        def rows(w_OI: Tensor, first: int, part: tuple[int, int]) -> None:
            skipped = max(0, start - first)
            if skipped < len(w_OI):
                begin = first + skipped - start
                w_OI[skipped:].mul_(factors[begin : begin + len(w_OI) - skipped, None])

        def vector(w_OI: Tensor, first: int, part: tuple[int, int]) -> None:
            rows(w_OI[0, :, None], part[0], (0, 1))

        def vector_of_one(w_OI: Tensor, first: int, part: tuple[int, int]) -> None:
            w_OI.add_(1)
            vector(w_OI, first, part)
            w_OI.sub_(1)

        return {"columns": columns, "rows": rows, "vector": vector, "1 + vector": vector_of_one}[self.way]
