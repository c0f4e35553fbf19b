"""What a verification finds, as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import fsum, log10, sqrt
from typing import Any, Literal, get_args

# In the order in which they are looked for; one class of findings does not stop the next, unless it cannot run.
Check = Literal["structure", "checksums", "codes", "values"]
CHECKS: tuple[Check, ...] = get_args(Check)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: which check found it, in which file or tensor, and what was expected."""

    check: Check
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far one weight is from its source.

    max_error: in steps (scales), before clipping; at most one half where nothing was clipped. relative_error: Frobenius
    norm of the difference over that of the source, 0 where that is zero. sqnr: signal to quantization noise in dB,
    None without noise.
    """

    name: str
    scheme: str
    max_error: float
    relative_error: float
    sqnr: float | None

    @classmethod
    def of(cls, name: str, scheme: str, max_error: float, noise: float, signal: float) -> TensorError:
        """From the sums of squares of the difference (`noise`) and of the source (`signal`)."""
        relative = float(f"{sqrt(noise) / sqrt(signal):.6g}") if signal else 0.0
        sqnr = round(10 * (log10(signal) - log10(noise)), 2) if noise and signal else None
        return cls(name, scheme, round(max_error, 4), relative, sqnr)


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a conversion's weights are from their source, in a few numbers: SQNR in dB over all noisy weights."""

    num_weights: int
    mean_sqnr: float
    worst_sqnr: float
    worst_name: str

    @classmethod
    def of(cls, errors: Iterable[TensorError]) -> Quality | None:
        """None where no weight has noise. The order of `errors` does not matter."""
        found = sorted((error.sqnr, error.name) for error in errors if error.sqnr is not None)
        if not found:
            return None
        mean = fsum(sqnr for sqnr, _ in found) / len(found)
        return cls(len(found), round(mean, 2), *found[0])

    def __str__(self) -> str:
        return f"{self.mean_sqnr:.1f} dB SQNR on average, {self.worst_sqnr:.1f} dB at worst ({self.worst_name})"


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome: what was checked, how far each weight is from the source, and everything that is wrong.

    method: the one that quantized the weights; None: that of another tool.
    """

    location: str
    source: str | None
    num_files: int
    num_tensors: int
    num_checksums: int
    num_equal: int
    errors: tuple[TensorError, ...]
    findings: tuple[Finding, ...]
    method: str | None = None

    @property
    def is_ok(self) -> bool:
        return not self.findings

    @property
    def failed(self) -> Check | None:
        """The first check with a finding."""
        return next((check for check in CHECKS if any(f.check == check for f in self.findings)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = Counter(finding.check for finding in self.findings)
        return {
            "location": self.location,
            "source": self.source,
            "ok": self.is_ok,
            "failed": self.failed,
            "num_files": self.num_files,
            "num_tensors": self.num_tensors,
            "num_checksums": self.num_checksums,
            "num_equal": self.num_equal,
            "num_findings": dict(counts),
            "findings": [asdict(finding) for finding in self.findings],
            "errors": [asdict(error) for error in self.errors],
        }
