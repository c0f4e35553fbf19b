"""GPTQ: codes column by column, each column's error made up for by those after it. `feedback` has how.

Ranges are those that `search` finds with the diagonal of the moments. A code need not be the nearest one to its value,
but it lies at most `MAX_SHIFT` codes from that: beyond it the error is passed on to the columns after.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantconvert.methods.base import BadInputs, Inputs, Needs, Noise, Tolerance
from quantconvert.methods.rtn import promised
from quantconvert.methods.search import SMALLEST_RATIO, Search
from quantconvert.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantconvert.methods.feedback import Feedback
    from quantconvert.quantized import Quantized

# How many codes a code may lie from the nearest one.
MAX_SHIFT = 4
UNKNOWN = "second moments are not known"


class Gptq:
    """Round with error feedback."""

    name = "gptq"
    words = "GPTQ: rounding with error feedback by second moments of inputs"
    needs: Needs = "moments"
    block_rows = 512  # a column of a block is one of many small operations

    def supports(self, scheme: Scheme) -> str | None:
        """What `search` has codes for."""
        return Search().supports(scheme)

    def span(self, blocks: Iterable[Tensor], scheme: Scheme, inputs: Inputs | None = None) -> Feedback:
        """The factor of the moments' inverse, found once for all rows."""
        from quantconvert.methods.feedback import find_feedback

        if inputs is None or inputs.moments is None:
            raise BadInputs(UNKNOWN)
        return find_feedback(inputs.moments)

    def held(self, scheme: Scheme, columns: int) -> int:
        """The factor in float64, found in place, panels of 512 columns, and what 128 columns of a block take, whose
        rows are as many as a cache holds where that is more than `block_rows`.
        """
        rows = max(self.block_rows, (1 << 18) // max(1, columns))
        return 8 * columns * columns + 3 * 8 * 512 * columns + 40 * min(128, columns) * rows

    def quantize(
        self,
        w_OI: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        span: Feedback | None = None,
        noise: Noise | None = None,
    ) -> Quantized:
        """Each group's searched range gives its scale and zero point; codes pass their errors on."""
        from quantconvert.methods.feedback import quantize

        if span is None:
            raise BadInputs(UNKNOWN)
        return quantize(w_OI, scheme, dtype, scale_dtype, span, noise)

    def scratch(self, scheme: Scheme) -> int:
        """What `search` takes, or weights on their way, codes twice, and what a block passes on."""
        return max(32, Search().scratch(scheme))

    def tolerance(self, scheme: Scheme, weight_dtype: str, scale_dtype: str) -> Tolerance:
        """`MAX_SHIFT` steps more than `search`."""
        return promised(scheme, weight_dtype, scale_dtype, SMALLEST_RATIO, MAX_SHIFT)
