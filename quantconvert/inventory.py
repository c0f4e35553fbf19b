"""What a checkpoint holds, quantized or not, from its headers: the answer of `quantconvert inspect`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.families import find_family
from quantconvert.patterns import template_of
from quantconvert.text import quoted

# Which tensor of a module says that it is quantized, by layout.
_SCALE_SUFFIXES = (".weight_scale", ".scales", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class DTypeRow:
    """All tensors of one dtype."""

    dtype: str
    num_tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """All tensors whose names differ only in layer and expert numbers."""

    template: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    num_tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint at a glance. `schemes` are lines for people, empty when it is not quantized."""

    location: str
    model_type: str
    family: str | None
    quant_method: str | None
    schemes: tuple[str, ...]
    num_tensors: int
    num_quantized_modules: int
    nbytes: int
    num_files: int
    dtypes: tuple[DTypeRow, ...]
    templates: tuple[TemplateRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """Count a checkpoint's tensors by dtype and by name template."""
    by_dtype: dict[str, list[int]] = defaultdict(list)
    by_template: dict[tuple[str, str], list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for ref in checkpoint.tensors:
        by_dtype[ref.dtype].append(ref.nbytes)
        by_template[template_of(ref.name), ref.dtype].append((ref.nbytes, ref.shape))
    block = checkpoint.quantization_block
    family = find_family(checkpoint)
    return Inventory(
        location=checkpoint.location,
        model_type=checkpoint.model_type,
        family=family.name if family else None,
        quant_method=str(block.get("quant_method")) if block else None,
        schemes=_schemes(block) if block else (),
        num_tensors=len(checkpoint.tensors),
        num_quantized_modules=sum(1 for ref in checkpoint.tensors if ref.name.endswith(_SCALE_SUFFIXES)),
        nbytes=checkpoint.nbytes,
        num_files=len(checkpoint.weight_files),
        dtypes=tuple(DTypeRow(d, len(sizes), sum(sizes)) for d, sizes in sorted(by_dtype.items())),
        templates=tuple(
            TemplateRow(t, d, tuple(dict.fromkeys(s for _, s in rows)), len(rows), sum(n for n, _ in rows))
            for (t, d), rows in by_template.items()
        ),
    )


def _schemes(block: dict[str, Any]) -> tuple[str, ...]:
    """One line a scheme of a `quantization_config`, whoever wrote it."""
    groups = block.get("config_groups")
    if isinstance(groups, dict):
        return tuple(_group_line(group) for group in groups.values() if isinstance(group, dict))
    bits, size = block.get("bits", block.get("w_bit")), block.get("group_size", block.get("q_group_size"))
    if bits is None:
        return ()
    widths = {"None": "per channel", "-1": "per channel", "0": "per tensor"}
    width = widths.get(_word(size), f"g{_word(size)}")
    symmetric = block.get("sym", block.get("symmetric", block.get("zero_point") is False))
    kind = "zero points" if block.get("zero_point") else "symmetric" if symmetric else "asymmetric"
    return (f"int{_word(bits)} {width} {kind}".strip(),)


def _group_line(group: dict[str, Any]) -> str:
    weights, targets = group.get("weights"), group.get("targets")
    weights = weights if isinstance(weights, dict) else {}
    strategy = _word(weights.get("strategy"))
    width = f"g{_word(weights.get('group_size'))}" if strategy == "group" else f"per {strategy}"
    kind = "symmetric" if weights.get("symmetric", True) else "asymmetric"
    shown = ", ".join(map(_word, targets[:20])) if isinstance(targets, list) else ""
    return f"{_number(weights)} {width} {kind}{_inputs(group)}: {shown}"


def _number(arguments: dict[str, Any]) -> str:
    return f"{_word(arguments.get('type', '?'))}{_word(arguments.get('num_bits', '?'))}"


def _inputs(group: dict[str, Any]) -> str:
    """`, int8 activations` where a group quantizes those too."""
    inputs = group.get("input_activations")
    return f", {_number(inputs)} activations" if isinstance(inputs, dict) else ""


def _word(value: object) -> str:
    """A value of somebody's config on one short line."""
    return quoted(value).strip("`")
