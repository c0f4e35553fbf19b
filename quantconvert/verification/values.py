"""Codes, scales and values against the source, a block of rows at a time.

Round-to-nearest promises that each code is a nearest one to the clipped value: |clip(w / s + z) - code| <= 1/2. How far
the value may lie outside the codes' range is bounded too, by the rounding of the scale to its dtype and, where there is
a zero point, by that of the zero point. A scale of zero, which others write, makes every weight of its group zero.

Legend: O rows of a block, I columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantconvert.checkpoint import LocalFolder, TensorRef
from quantconvert.errors import QuantConvertError
from quantconvert.job import Limits
from quantconvert.layouts import get_layout
from quantconvert.methods.base import Quantized
from quantconvert.methods.rtn import squares
from quantconvert.planning.memory import TILE_ELEMENTS, execution_for, read_multiple, spans
from quantconvert.run.blocks import BlockReader, dequantize
from quantconvert.run.io import Files, Workspace, bytes_of, torch_dtype
from quantconvert.run.readers import open_reader, read_part
from quantconvert.schemes import Scheme
from quantconvert.sources import Source, Sources, Weight
from quantconvert.verification.findings import Check, Finding, TensorError

# float32 division and addition, in steps: 2^8 * 2^-24 * 2, with room.
ROUNDING = 1e-4
# How much larger a scale may be than its group asks for: 7.5 / 7 where a quantizer spans 14 steps instead of 15.
MAX_COARSE = 1.15
# The smallest numbers of the dtypes of scales: what would be less becomes that.
_SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}
_CHUNK = 1 << 22


class ValueCheck:
    """Checks the weights of one folder, alone or against their source."""

    def __init__(self, out: Path, source: Path | None, limits: Limits) -> None:
        self.files, self.work, self.execution = Files(LocalFolder(out)), Workspace(), execution_for(limits)
        self.source_files = Files(LocalFolder(source)) if source else None
        self.source_work = Workspace()
        self.findings: list[Finding] = []
        self.num_equal = 0
        self.errors: list[TensorError] = []

    def close(self) -> None:
        """Close all files."""
        self.files.close()
        if self.source_files:
            self.source_files.close()

    def run(self, tensors: Sequence[Source], sources: Sources | None) -> None:
        """Look at every tensor of the result; what the source has and the result lacks is a finding too."""
        known = {source.name: source for source in sources.tensors} if sources else {}
        for tensor in tensors:
            origin = known.pop(tensor.name, None)
            if sources and origin is None:
                origin = _fused(known, tensor)
            if sources and origin is None:
                self._add("values", tensor.name, "is not in the source")
                continue
            try:
                self._check(tensor, origin)
            except QuantConvertError as error:
                self._add("values", tensor.name, error.message)
        used = {tensor.name for tensor in tensors}
        for name, source in known.items():
            if name not in used and not (isinstance(source, Weight) and source.values.name in used):
                self._add("values", name, "is in the source, but not in the result")

    def _add(self, check: Check, where: str, message: str) -> None:
        self.findings.append(Finding(check, where, message))

    def _check(self, tensor: Source, origin: Source | None) -> None:
        if isinstance(tensor, Weight) and tensor.stored is not None:
            self._codes(tensor, origin)
        elif origin is not None:
            self._same(tensor, origin)
            self.num_equal += 1

    def _same(self, tensor: Source, origin: Source) -> None:
        """A tensor in high precision: the source's bytes, or its values decoded and rounded once."""
        assert isinstance(tensor, TensorRef)
        assert self.source_files
        if isinstance(origin, Weight) and origin.encoding == "plain" and origin.view.expert is None:
            origin = origin.values  # stored transposed, and kept so
        if tensor.shape != origin.shape:
            self._add("values", tensor.name, f"expected shape {list(origin.shape)}, got {list(tensor.shape)}")
            return
        if isinstance(origin, TensorRef):
            same = tensor.dtype == origin.dtype and self._same_bytes(tensor, origin)
        elif len(origin.shape) == 1:
            raw = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            self.files.read_into(tensor.file, bytes_of(raw), tensor.offset)
            same = bytes_of(raw) == bytes_of(read_part(origin, self.source_files))
        else:
            same = self._same_values(tensor, origin)
        if not same:
            self._add("values", tensor.name, "differs from the source, which it should equal")

    def _same_bytes(self, tensor: TensorRef, origin: TensorRef) -> bool:
        assert self.source_files
        for begin, end in spans(0, tensor.nbytes, _CHUNK):
            mine = self.work.tensor("mine", torch.uint8, (end - begin,))
            theirs = self.work.tensor("theirs", torch.uint8, (end - begin,))
            self.files.read_into(tensor.file, bytes_of(mine), tensor.offset + begin)
            self.source_files.read_into(origin.file, bytes_of(theirs), origin.offset + begin)
            if not torch.equal(mine, theirs):
                return False
        return True

    def _same_values(self, tensor: TensorRef, origin: Weight) -> bool:
        assert self.source_files
        mine = open_reader(tensor, self.files, self.work, self.execution)
        theirs = open_reader(origin, self.source_files, self.source_work, self.execution)
        for begin, end in spans(0, tensor.shape[0], _tile(tensor.shape, read_multiple(origin))):
            expected = theirs.rows(begin, end).to(torch_dtype(tensor.dtype)).float()
            if not torch.allclose(mine.rows(begin, end), expected, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def _codes(self, tensor: Weight, origin: Source | None) -> None:
        stored, fmt = tensor.stored, get_layout(tensor.layout or "")
        assert stored is not None
        if origin is not None and origin.shape != tensor.shape:
            self._add("values", tensor.module, f"expected shape {list(origin.shape)}, got {list(tensor.shape)}")
            return
        mine = BlockReader(fmt, stored, self.files, self.work)
        theirs = None
        if origin is not None and self.source_files:
            theirs = open_reader(origin, self.source_files, self.source_work, self.execution)
        sums = _Sums(stored.scheme, (origin.dtype if origin else tensor.dtype, tensor.dtype))
        multiple = math.lcm(read_multiple(tensor), read_multiple(origin) if origin else 1)
        for begin, end in spans(0, tensor.shape[0], _tile(tensor.shape, multiple)):
            quantized = mine.rows(begin, end)
            problem = _range_problem(quantized, stored.scheme)
            if problem:
                self._add("codes", tensor.module, f"rows {begin} to {end - 1}: {problem}")
                return
            if theirs is not None:
                sums.add(theirs.rows(begin, end), quantized, mine.column_groups)
        if origin is not None:
            self._judge(tensor, sums, coarse=not (isinstance(origin, Weight) and origin.stored))

    def _judge(self, tensor: Weight, sums: _Sums, coarse: bool) -> None:
        """coarse: whether a scale that is larger than its group asks for is wrong (another quantizer's may be)."""
        if all(map(math.isfinite, (sums.steps, sums.noise, sums.signal))):
            self.errors.append(TensorError.of(tensor.name, sums.scheme.label, sums.steps, sums.noise, sums.signal))
        if not sums.inside <= 0.5 + ROUNDING:
            message = f"a code is {sums.inside:.4f} steps from its value: expected at most 0.5"
            self._add("values", tensor.module, message)
        elif not sums.excess <= 0:
            bound = sums.steps - sums.excess
            message = f"a value lies {sums.steps:.4f} steps from its code: expected at most {bound:.4f} with clipping"
            self._add("values", tensor.module, message)
        elif coarse and sums.coarse > MAX_COARSE:
            message = f"a scale is {sums.coarse:.3g} times what the values of its group ask for"
            self._add("values", tensor.module, message)


class _Sums:
    """Largest and summed errors of one weight, in float64, over its blocks in order.

    steps: the largest error, before clipping; excess: by how much the worst one is larger than it may be; inside: the
    largest after clipping; coarse: the largest scale over what the range of its values asks for. dtypes: that in which
    the scale was computed, and that of the stored scale.
    """

    def __init__(self, scheme: Scheme, dtypes: tuple[str, str]) -> None:
        self.scheme, self.dtypes = scheme, dtypes
        self.inside = self.steps = self.noise = self.signal = 0.0
        self.excess = -math.inf
        self.coarse = 0.0
        self._low = self._high = 0.0

    def add(self, w_OI: Tensor, quantized: Quantized, order: Tensor | None) -> None:
        """Take in a block: `w_OI` float32, its codes, and GPTQ's group of each column where they are out of order."""
        noise = squares(dequantize(quantized, self.scheme, order).sub_(w_OI))
        steps_OI, scale_OG = self._steps(w_OI, quantized, order)
        if not math.isfinite(noise):  # a product that float32 does not hold
            groups = _groups(w_OI, scale_OG) if order is None else order
            noise = squares(steps_OI.double().mul_(scale_OG.double()[:, groups]))
        self.noise += noise
        self.signal += squares(w_OI)
        if order is None:
            self._compare_scales(w_OI, scale_OG)
        codes_OI = quantized.codes.float()
        top = (1 << self.scheme.num_bits) - 1
        self.inside = _larger(self.inside, ((steps_OI + codes_OI).clamp_(0, top) - codes_OI).abs_().max())
        off_OI = steps_OI.abs_()
        self.steps = _larger(self.steps, off_OI.max())
        bound_OG = _outside(self.scheme, scale_OG, self.dtypes)
        if order is not None:
            self.excess = _larger(self.excess, (off_OI - bound_OG[:, order]).max())
        else:
            off_OG = off_OI.view(off_OI.shape[0], scale_OG.shape[1], -1).amax(-1)
            self.excess = _larger(self.excess, (off_OG - bound_OG).max())

    def _compare_scales(self, w_OI: Tensor, scale_OG: Tensor) -> None:
        """A scale must not be larger than the range of its values asks for: codes far from the values would pass."""
        w_OGS = w_OI.view(w_OI.shape[0], scale_OG.shape[1], -1)
        low, high = w_OGS.amin(-1).clamp_(max=0), w_OGS.amax(-1).clamp_(min=0)
        if self.scheme.strategy == "tensor":
            self._low, self._high = min(self._low, float(low.min())), max(self._high, float(high.max()))
            low, high = torch.full((1, 1), self._low), torch.full((1, 1), self._high)
        levels = float((1 << self.scheme.num_bits) - 1)
        wanted = torch.maximum(-low, high) / (levels / 2) if self.scheme.symmetric else high / levels - low / levels
        tiny = 2 * max(_SMALLEST.get(dtype, 0.0) for dtype in self.dtypes)  # below that a scale becomes 1, or is coarse
        ratio = torch.where(wanted > tiny, (scale_OG - tiny) / wanted, 0.0)
        found = float(ratio.max())
        self.coarse = found if self.scheme.strategy == "tensor" else max(self.coarse, found)

    def _steps(self, w_OI: Tensor, quantized: Quantized, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many steps each value is from its code, with its sign, and the scales; infinite where none helps."""
        scale_OG, zero_OG = quantized.scale.float(), quantized.zero_points(self.scheme).float()
        codes_OI = quantized.codes.float()
        order = _groups(w_OI, scale_OG) if order is None else order
        steps_OI = (w_OI / scale_OG[:, order]).add_(zero_OG[:, order]).sub_(codes_OI)
        if bool((scale_OG == 0).any()):
            steps_OI.masked_fill_((scale_OG == 0)[:, order] & (w_OI == 0), 0.0)
        return steps_OI, scale_OG


def _groups(w_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """The group of each column [I], in their order."""
    return torch.arange(scale_OG.shape[1]).repeat_interleave(w_OI.shape[1] // scale_OG.shape[1])


def _larger(known: float, value: Tensor) -> float:
    """The maximum, NaN if the new value is."""
    new = float(value)
    return new if math.isnan(new) else max(known, new)


def _range_problem(quantized: Quantized, scheme: Scheme) -> str | None:
    """Why scales, zero points or codes cannot be those of the scheme."""
    top = (1 << scheme.num_bits) - 1
    if not bool(torch.isfinite(quantized.scale).all()):
        return "a scale is NaN or Inf"
    if bool((quantized.scale < 0).any()):
        return "a scale is negative"
    if quantized.zero_point is not None and bool((quantized.zero_point > top).any()):
        return f"a zero point is larger than {top}"
    if bool((quantized.codes > top).any()):
        return f"a code is larger than {top}"
    return None


# Half the distance from 1 to the next number, and the smallest number, of each dtype of scales.
_PRECISION: Mapping[str, tuple[float, float]] = {
    "BF16": (2.0**-8, 2.0**-133),
    "F16": (2.0**-11, 2.0**-24),
    "F32": (2.0**-24, 2.0**-149),
}


def _outside(scheme: Scheme, scale_OG: Tensor, dtypes: tuple[str, str]) -> Tensor:
    """The most steps that a value of each group may be from its code when it is clipped: half a step, and what rounding
    scale and zero point moves the ends of the range. Scales near the smallest number are rounded by a part of that.
    """
    precisions = [_PRECISION.get(dtype, (2.0**-8, 2.0**-133)) for dtype in dtypes]
    epsilon, tiny = max(p[0] for p in precisions), sum(p[1] for p in precisions)
    levels = float(1 << scheme.num_bits)
    moved_OG = 2 * epsilon + tiny / scale_OG.double()
    return 0.5 + (levels / 2 if scheme.symmetric else 2 * levels) * moved_OG + (0 if scheme.symmetric else 1.0)


def _tile(shape: tuple[int, ...], multiple: int) -> int:
    return max(multiple, TILE_ELEMENTS // max(1, shape[1]) // multiple * multiple)


def _fused(known: dict[str, Source], tensor: Source) -> Source | None:
    """The stored tensor that holds several weights of the source, where the result kept it as it is."""
    parts = [s for s in known.values() if isinstance(s, Weight) and s.values.name == tensor.name]
    return parts[0].values if parts else None


def check_values(
    out: Path,
    tensors: Sequence[Source],
    source: tuple[Path, Sources] | None,
    limits: Limits,
) -> ValueCheck:
    """Findings and errors over all tensors of the result in `out`."""
    check = ValueCheck(out, source[0] if source else None, limits)
    try:
        check.run(tensors, source[1] if source else None)
    finally:
        check.close()
    return check
