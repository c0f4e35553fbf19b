"""A range for each group, searched with the importances of columns, and nearest codes. `searching` has the arithmetic.

Each code is a nearest one to the clipped value, as `rtn` promises. A value may lie farther outside, as a group's codes
may span 0.7 of its range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantconvert.methods.base import BadInputs, Inputs, Needs, Noise, Tolerance
from quantconvert.methods.rtn import promised
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.quantized import Quantized

# The smallest part of a group's range that its codes may span.
SMALLEST_RATIO = 0.7
UNKNOWN = "importances are not known"


class Search:
    """Round to nearest within the range that loses least."""

    name = "search"
    words = "round to nearest in ranges searched by the importance of each column"
    needs: Needs = "importance"
    block_rows = 0

    def supports(self, scheme: Scheme) -> str | None:
        """One range for a whole tensor would have to be searched over all of its blocks at once."""
        if scheme.type == "float":
            return "ranges of whole numbers are searched"
        return "ranges are searched by group or by channel" if scheme.strategy == "tensor" else None

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> Tensor:
        """The importances, float32 [I], the largest 1."""
        from quantconvert.methods.searching import check_importance

        if inputs is None or inputs.importance is None:
            raise BadInputs(UNKNOWN)
        return check_importance(inputs.importance)

    def held(self, scheme: Scheme, columns: int) -> int:
        """The importances, and as much again while they are checked."""
        return 8 * columns

    def quantize(
        self,
        w_OI: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        span: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Quantized:
        """Each group's searched range gives its scale and zero point, each value the nearest code."""
        from quantconvert.methods.rounding import nearest
        from quantconvert.methods.searching import best_qparams

        if span is None:
            raise BadInputs(UNKNOWN)
        scale, zero_point = best_qparams(w_OI, scheme, dtype, scale_dtype, span)
        return nearest(w_OI, scheme, scale, zero_point, noise)

    def scratch(self, scheme: Scheme) -> int:
        """While ranges are searched: five numbers a value, and the parameters of all ratios for each group."""
        return 28 + 400 // (scheme.group_size or 400)

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        """Half a step inside; outside as far as a narrower range leaves a value, too."""
        return promised(scheme, weight_dtype, scale_dtype, SMALLEST_RATIO)
