"""The model card of the result: where it comes from, how it was made, how to load it."""

from __future__ import annotations

import re
from pathlib import PurePath

from quantconvert.engines import load_lines
from quantconvert.layouts import LAYOUTS
from quantconvert.metadata import base_model_of, metadata_block, split_card, tags_of
from quantconvert.planning import Plan
from quantconvert.text import printable, redacted
from quantconvert.version import __version__

BASE_CARD = "# Card of the base model"
# Tags that say how a quantized source was stored.
_OURS = re.compile(rf"{'|'.join(LAYOUTS)}|fp8|mxfp4|\d-bit|quantconvert")
_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def base_model(plan: Plan) -> str:
    """The id of the model that was quantized: asked for, a Hub id, or what the folder's name and config suggest."""
    if plan.job.base_model:
        return plan.job.base_model
    location = plan.checkpoint.location
    if plan.checkpoint.revision:
        return location
    cached = _CACHE.search(location + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    old = base_model_of(split_card(plan.checkpoint.card)[0])
    if plan.source_format and old:
        return old
    named = plan.checkpoint.config.get("_name_or_path")
    if isinstance(named, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", named):
        return named
    return printable(PurePath(location).name, newlines=False) or "unknown"


def method(plan: Plan) -> str:
    """How the weights were made, in a few words."""
    operations = {task.operation for task in plan.quantized}
    if "repack" in operations:
        return "codes, scales and zero points of the source in another layout"
    if "dequantize" in operations:
        return "(code - zero point) * scale, rounded once"
    decoded = f", from weights decoded from {plan.source_format}" if plan.source_format else ""
    return f"round to nearest (RTN), no calibration data{decoded}"


def load_hint(plan: Plan, out: str) -> list[str]:
    """Commands that load the result; only those that work for this model and layout."""
    return load_lines(plan.loadable, out, plan.job.engines)


def render_card(plan: Plan, command: str | None) -> str:
    """README.md of the result, without tokens; the source card's own text follows under a heading of its own."""
    old_metadata, old_text = split_card(plan.checkpoint.card)
    base = base_model(plan)
    relation = "quantized" if plan.scheme else None  # the Hub has no word for going back
    kind = [plan.format, f"{plan.scheme.num_bits}-bit"] if plan.scheme else []
    old_tags = [tag for tag in tags_of(old_metadata) if not (plan.source_format and _OURS.fullmatch(tag))]
    old_text = old_text.rpartition(f"{BASE_CARD}\n")[2] if BASE_CARD in old_text else old_text
    tags = [*old_tags, *kind, "quantconvert"]
    metadata = {k: v for k, v in old_metadata.items() if k not in ("model-index", "base_model_relation")}
    metadata |= {"base_model": base, "tags": list(dict.fromkeys(tags))}
    metadata |= {"base_model_relation": relation} if relation else {}
    name = base.rpartition("/")[2]
    rows = [
        ("base model", base + (f" at revision `{plan.checkpoint.revision}`" if plan.checkpoint.revision else "")),
        ("scheme", ", ".join(f"{s.label} ({n} weights)" for s, n in plan.schemes.items()) or "none"),
        ("format", plan.format + (f": {LAYOUTS.find(plan.format).summary}" if plan.scheme else "")),
        ("method", method(plan)),
        ("size", f"{plan.checkpoint.nbytes} -> {plan.total_size} bytes, {plan.bits_per_weight:.2f} bits per weight"),
        ("kept in high precision", kept_summary(plan)),
        ("made with", f"quantconvert {__version__}"),
    ]
    parts = [
        f"---\n{metadata_block(metadata)}---\n\n# {name}, {relation or 'dequantized'}\n",
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows) + "\n",
        "Load it (replace `PATH` by this repository):\n\n```\n" + "\n".join(load_hint(plan, "PATH")) + "\n```\n",
    ]
    if command:
        command = printable(command)
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
        parts.append(f"Command:\n\n{fence}\n{command}\n{fence}\n")
    if old_text.strip():
        parts.append(f"{BASE_CARD}\n\n{old_text.strip()}\n")
    return redacted("\n".join(parts))


def kept_summary(plan: Plan) -> str:
    """`2 embedding, 9 norm`: how many tensors stay, by reason."""
    counts: dict[str, int] = {}
    for task in plan.kept:
        counts[str(task.reason)] = counts.get(str(task.reason), 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
