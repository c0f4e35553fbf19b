"""Headers, index, sizes, config against tensors, and checksums: what shows without the source."""

from __future__ import annotations

import re
from pathlib import Path

from quantconvert.checkpoint import Checkpoint, load_checkpoint, reader_of
from quantconvert.checkpoint.files import INDEX_NAME
from quantconvert.checkpoint.header import parse_object
from quantconvert.checkpoint.load import MAX_JSON_VALUES
from quantconvert.errors import CheckpointError, QuantConvertError, Refusal
from quantconvert.families import Classifier
from quantconvert.layouts import LAYOUTS, Layout
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.planning.decision import is_kept_linear
from quantconvert.run.spool import direct
from quantconvert.sources import Read, find_sources
from quantconvert.verification.findings import Finding
from quantconvert.verification.inputs import check_inputs
from quantconvert.verification.place import Place, sum_of
from quantconvert.verification.report import REPORT_NAME, read_report


def check_structure(
    place: Place, findings: list[Finding], is_ours: bool = False
) -> tuple[Checkpoint, tuple[Read, ...]] | None:
    """The checkpoint and its tensors as weights; None, with findings, where they cannot be read.

    is_ours: whether a conversion of ours is about to put it in place.
    """
    folder = place.folder
    try:
        checkpoint = load_checkpoint(place.repo)
    except QuantConvertError as error:
        findings += [Finding("structure", str(folder), part.message) for part in _parts(error)]
        return None
    errors: list[QuantConvertError] = []

    read = reader_of(direct(place.repo))
    sources = find_sources(checkpoint, None, read, errors, codes_first=True)
    is_ours = is_ours or (folder / REPORT_NAME).is_file()
    if not errors and not is_ours and not any(read.num_bits for read in sources.reads):
        message = "has no quantization_config, and no weight is quantized: expected a converted checkpoint"
        findings.append(Finding("structure", "config.json", message))
    findings += [Finding("structure", str(folder), part.message) for error in errors for part in _parts(error)]
    _check_index(folder, checkpoint, findings)
    if errors:
        return None
    check_inputs(sources.reads, Classifier(checkpoint).fused, read, findings)
    try:
        _check_config(checkpoint, sources.reads, findings, is_ours)
    except (re.error, QuantConvertError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
            RecursionError) as error:  # fmt: skip
        findings.append(Finding("structure", "config.json", f"quantization_config cannot be read: {error}"))
    return checkpoint, sources.reads


def _parts(error: QuantConvertError) -> tuple[QuantConvertError, ...]:
    return error.errors if isinstance(error, Refusal) else (error,)


def _check_index(folder: Path, checkpoint: Checkpoint, findings: list[Finding]) -> None:
    """Every tensor in the index and every file in use; the total that the index states."""
    strangers = [file.path for file in checkpoint.dropped_files if file.path.endswith(".safetensors")]
    findings += [Finding("structure", path, "belongs to no checkpoint, but engines may load it") for path in strangers]
    if not (folder / INDEX_NAME).is_file():
        return
    try:
        index = parse_object((folder / INDEX_NAME).read_bytes(), f"`{INDEX_NAME}`", max_values=MAX_JSON_VALUES)
    except (OSError, CheckpointError) as error:
        findings.append(Finding("structure", INDEX_NAME, str(error)))
        return
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        findings.append(Finding("structure", INDEX_NAME, "expected objects as weight_map and metadata"))
        return
    for ref in checkpoint.tensors:
        if weight_map.get(ref.name) != ref.file:
            findings.append(Finding("structure", ref.name, f"lies in `{ref.file}`, which `{INDEX_NAME}` does not say"))
    total = metadata.get("total_size")
    if total is not None and total != checkpoint.nbytes:
        message = f"total_size: expected {checkpoint.nbytes} bytes of tensors, got {total}"
        findings.append(Finding("structure", INDEX_NAME, message))


def _check_config(checkpoint: Checkpoint, tensors: tuple[Read, ...], findings: list[Finding], is_ours: bool) -> None:
    """The config must tell engines to quantize exactly the modules that are."""
    block = checkpoint.quantization_block
    layout: Layout | None = LAYOUTS.get(str(block.get("quant_method"))) if block else None
    if block is None or layout is None:
        return
    leaves = layout.leaves(block)
    classifier = Classifier(checkpoint)
    for source in tensors:
        module = source.name.removesuffix(WEIGHT_SUFFIX)
        if source.num_bits is not None:
            if leaves(module):
                findings.append(Finding("structure", module, "is quantized, but quantization_config leaves it alone"))
            _check_width(source, layout.width(block, module), findings)
        elif is_ours and not layout.tensors_tell and _is_matrix(source) and not module.endswith("lm_head"):
            reason = classifier.role(source).reason
            if (reason is None or is_kept_linear(source.name, 2, reason)) and not leaves(module):
                findings.append(Finding("structure", module, "is plain, but quantization_config says it is quantized"))


def _is_matrix(read: Read) -> bool:
    return len(read.shape) == 2 and read.name.endswith(WEIGHT_SUFFIX)


def _check_width(weight: Read, stated: tuple[int, int] | None, findings: list[Finding]) -> None:
    """Engines take bits and group size from the config, where we take them from the tensors."""
    if stated is None or weight.stored is None:
        return
    scheme, columns = weight.stored.scheme, weight.shape[1]
    bits, size = stated
    if (bits, -(-columns // size) if size > 0 else 1) != (scheme.num_bits, scheme.num_groups(columns)):
        message = f"is {scheme.label}, but quantization_config says bits {bits}, group_size {size}"
        findings.append(Finding("structure", weight.module, message))


def check_sums(place: Place, findings: list[Finding]) -> int:
    """Compare every file with the sha256 in the report; returns how many were compared, 0 without a report."""
    try:
        report = read_report(place.folder)
    except (OSError, ValueError, RecursionError) as error:
        findings.append(Finding("checksums", REPORT_NAME, f"cannot be read: {error}"))
        return 0
    if report is None:
        return 0
    for name, expected in report["files"].items():
        outside = ".." in Path(str(name)).parts or Path(str(name)).is_absolute()
        found = None if outside else sum_of(place.repo, str(name))
        if found is None:
            findings.append(Finding("checksums", str(name), "is missing: the conversion wrote it"))
            continue
        if found != expected:
            message = f"was changed after the conversion: expected sha256 {expected}, got {found}"
            findings.append(Finding("checksums", str(name), message))
    return len(report["files"])
