"""Multiplying by a Hadamard matrix, fast, and by sums in one fixed order. Imports torch.

Every sum is made element by element in an order that depends on the size alone, never by a matrix product, whose order
a library chooses by shape: so the bytes do not depend on how a weight is cut.

Legend: N values that are mixed, C others beside them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantconvert.buffers import Workspace
from quantconvert.sources.steps.hadamard import factors_of, paley, signs


class Mixer:
    """x Q for Q = diag(signs) H / sqrt(order), orthogonal; H: blocks of `factors_of(size)`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.factors = factors_of(size)
        self._signs = torch.tensor(signs(size), dtype=torch.float32)[:, None]
        self._paley = torch.tensor(paley(self.factors.paley), dtype=torch.float32)
        self._scale = 1 / math.sqrt(self.factors.order)
        self._work = Workspace()

    def mix(self, x_NC: Tensor) -> None:
        """Replace each column x [N] by x Q, in place; of several times `size` values each part by itself.

        x_NC: float32, contiguous; N a multiple of `size`. Takes a second buffer of its size.
        """
        height, width = x_NC.shape
        _, order, power = self.factors
        x_NC.view(-1, self.size, width).mul_(self._signs)
        source, target = x_NC, self._work.tensor("mixed", torch.float32, (height, width))
        if order > 1:
            self._mix_paley(source.view(-1, order, power * width), target.view(-1, order, power * width))
            source, target = target, source
        step = 1
        while step < power:
            pairs, sums = source.view(-1, 2, step * width), target.view(-1, 2, step * width)
            torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
            torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
            source, target, step = target, source, 2 * step
        torch.mul(source, self._scale, out=x_NC)

    def _mix_paley(self, source: Tensor, target: Tensor) -> None:
        """target [., j, .] = the sum over i of source [., i, .] H [i, j], i from first to last."""
        torch.mul(source[:, :1], self._paley[0][:, None], out=target)
        for i in range(1, source.shape[1]):
            target.addcmul_(source[:, i : i + 1], self._paley[i][:, None])

    def mix_rows(self, x_CN: Tensor) -> None:
        """The same for each row x [N] of a matrix that need not be contiguous. Takes two buffers of its size."""
        turned = self._work.tensor("turned", torch.float32, (x_CN.shape[1], x_CN.shape[0]))
        turned.copy_(x_CN.t())
        self.mix(turned)
        x_CN.copy_(turned.t())
