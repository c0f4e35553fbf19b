"""Whether a converted checkpoint is what it says, and what was asked: structure, checksums, values."""

from quantconvert.verification.findings import Finding, TensorError, Verification

__all__ = ["Finding", "TensorError", "Verification"]
