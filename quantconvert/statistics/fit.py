"""Whether statistics are of the checkpoint that they are to serve."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from quantconvert.checkpoint import TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, some
from quantconvert.statistics.reader import OBSERVE, Statistics

HINT = f"observe this checkpoint: {OBSERVE}"
# The first bytes of so many matrices tell one model's weights from another's.
FINGERPRINTED, FINGERPRINT_NBYTES = 4, 4096


def fingerprint(refs: Iterable[TensorRef], read: Callable[[TensorRef], bytes]) -> str:
    """sha256 over the beginnings of a few matrices of a checkpoint. read: the bytes of a tensor."""
    matrices = sorted((ref for ref in refs if len(ref.shape) > 1 and ref.nbytes), key=lambda ref: ref.name)
    chosen = {i * (len(matrices) - 1) // (FINGERPRINTED - 1) for i in range(FINGERPRINTED)} if matrices else set()
    digest = hashlib.sha256()
    for i in sorted(chosen):
        count = min(FINGERPRINT_NBYTES, matrices[i].nbytes)
        digest.update(matrices[i].name.encode() + read(matrices[i]._replace(nbytes=count)))
    return digest.hexdigest()


def check_weights(
    statistics: Statistics,
    refs: Iterable[TensorRef],
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
) -> None:
    """Append to `errors` where statistics were observed on other weights, as far as they say on which."""
    if statistics.fingerprint is not None and statistics.fingerprint != fingerprint(refs, read):
        message = f"--statistics `{statistics.path}` are of other weights, of the same shapes"
        errors.append(CheckpointError(message, hint=HINT))


def check_fit(
    statistics: Statistics, model_type: str, widths: Mapping[str, int], errors: list[QuantConvertError]
) -> None:
    """Append to `errors` where the checkpoint has another type, lacks a module, or has one of another width.

    widths: in_features of every linear module of the checkpoint.
    """
    where = f"--statistics `{statistics.path}`"
    if statistics.model_type != model_type:
        message = f"{where} are of another model: expected model_type `{model_type}`, got `{statistics.model_type}`"
        errors.append(CheckpointError(message, hint=HINT))
    strange = [module for module in statistics.inputs if module not in widths]
    if strange:
        message = f"{where} are of {len(strange)} modules that the checkpoint does not have: {some(strange)}"
        errors.append(CheckpointError(message, hint=HINT))
    found = []
    for module, width in widths.items():
        ref = statistics.second_moment(module)
        if ref is not None and ref.shape[0] != width:
            found.append(f"\n  `{module}`: expected {width} columns, got {ref.shape[0]}")
    if found:
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        errors.append(CheckpointError(f"{where} are of another width:{''.join(found[:10])}{more}", hint=HINT))
