"""What is wrong with a weight's data, as errors."""

from __future__ import annotations

from quantconvert.errors import CheckpointError, UnsupportedError
from quantconvert.methods import BadInputs
from quantconvert.sources import Read

# How many values are NaN and how many Inf, and the index of the first of them.
Nonfinite = tuple[int, int, tuple[int, ...]]


def nonfinite_text(found: Nonfinite) -> str:
    """`3 NaN, 1 Inf, first at [0, 17]`."""
    nan, inf, first = found
    counts = ", ".join(f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "Inf")) if count)
    return f"{counts}, first at {list(first)}"


def nonfinite_error(ref: Read, found: Nonfinite) -> CheckpointError:
    return CheckpointError(
        f"tensor `{ref.name}` in `{ref.file}` holds {nonfinite_text(found)}: expected finite weights",
        hint="--nan-policy keep leaves such tensors (and what is fused with them) unquantized",
    )


def inputs_error(ref: Read, error: BadInputs) -> CheckpointError:
    return CheckpointError(f"tensor `{ref.name}`: {error}: expected what its {ref.matrix[1]} inputs can be")


def overflow_error(ref: Read, fmt: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor `{ref.name}` in `{ref.file}` has a scale above 65504, the largest of float16, which {fmt} stores",
        hint="--format compressed-tensors stores scales in the weight's own dtype, or --ignore this tensor",
    )
