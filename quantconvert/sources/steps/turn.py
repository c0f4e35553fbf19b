"""Steps that rotate a weight: its columns, where it reads a rotated vector, or its rows, where it gives one.

For the orthogonal Q of `Mixer`: W x = (W Q) (Q^T x), and what W gives is rotated by Q^T W. Norms that only divide by
the root mean square change nothing but the vector's length, which Q keeps; their gains go to what reads them before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quantconvert.checkpoint import TensorRef
from quantconvert.sources.steps.base import Change, Step

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.sources.rows import Files


@dataclass(frozen=True, slots=True)
class TurnColumns(Step):
    """Each row times diag(gain) Q, in parts of `size` columns. A vector, being one row, is what it gives.

    norm: that whose stored weight is the gain of all columns, or 1 more where it is stored so (`plus_one`); None: 1.
    """

    size: int
    norm: TensorRef | None = None
    plus_one: bool = False

    kind: ClassVar[str] = "turn columns"
    whole_rows: ClassVar[bool] = True
    scratch: ClassVar[int] = 8  # a tile turned, and once more while it is mixed

    @property
    def partners(self) -> tuple[TensorRef, ...]:
        return () if self.norm is None else (self.norm,)

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        return 8 * shape[-1]

    def open(self, files: Files) -> Change:
        from quantconvert.sources.steps.mixing import Mixer

        mixer, gain = Mixer(self.size), self._gain(files)

        def change(w_OI: Tensor, first_row: int, columns: tuple[int, int]) -> None:
            if gain is not None:
                w_OI.mul_(gain)
            parts = w_OI.shape[1] // self.size
            if parts == 1 or not w_OI.is_contiguous():
                mixer.mix_rows(w_OI)
            else:
                mixer.mix_rows(w_OI.view(-1, self.size))

        return change

    def _gain(self, files: Files) -> Tensor | None:
        if self.norm is None:
            return None
        import torch

        from quantconvert.buffers import bytes_of, torch_dtype

        stored = torch.empty(self.norm.shape, dtype=torch_dtype(self.norm.dtype))
        files.read_into(self.norm.file, bytes_of(stored), self.norm.offset)
        return stored.float() + 1 if self.plus_one else stored.float()


@dataclass(frozen=True, slots=True)
class TurnRows(Step):
    """Q^T times the rows, in parts of `size`: those from `start` on of each `period` (0: of each `size`) rows."""

    size: int
    start: int = 0
    period: int = 0

    kind: ClassVar[str] = "turn rows"
    axis: ClassVar[Literal["columns", "rows"]] = "rows"

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        return 4 * self.size

    def open(self, files: Files) -> Change:
        import torch

        from quantconvert.buffers import Workspace
        from quantconvert.sources.steps.mixing import Mixer

        mixer, work = Mixer(self.size), Workspace()
        period = self.period or self.size

        def change(w_OC: Tensor, first_row: int, columns: tuple[int, int]) -> None:
            height, width = w_OC.shape
            if period == self.size:
                mixer.mix(w_OC)
                return
            heads = height // period
            part = w_OC.view(heads, period, width)[:, self.start : self.start + self.size]
            rows = work.tensor("rows", torch.float32, (heads * self.size, width))
            rows.view(part.shape).copy_(part)
            mixer.mix(rows)
            part.copy_(rows.view(part.shape))

        return change


@dataclass(frozen=True, slots=True)
class Fill(Step):
    """Every value becomes `value`: a norm's weight whose gain has gone to what reads it."""

    value: float

    kind: ClassVar[str] = "fill"

    def open(self, files: Files) -> Change:
        def change(w_OI: Tensor, first_row: int, columns: tuple[int, int]) -> None:
            w_OI.fill_(self.value)

        return change
