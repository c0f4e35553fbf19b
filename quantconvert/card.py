"""The model card of the result: where it comes from, how it was made, how good it is, how to load it.

The same for the same result: the command is written from the job, not as it was typed, and no folder is named.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from quantconvert.checkpoint.files import PICTURE
from quantconvert.engines import NOBODY, load_lines, snippets
from quantconvert.layouts import LAYOUTS
from quantconvert.markdown import demoted, fenced
from quantconvert.metadata import base_model_of, metadata_block, split_card, tags_of
from quantconvert.methods import METHODS
from quantconvert.options import DEFAULT_DTYPE
from quantconvert.planning import Plan
from quantconvert.text import printable, redacted, size
from quantconvert.version import __version__

if TYPE_CHECKING:
    from quantconvert.verification.findings import Quality

BASE_CARD = "Card of the base model"
_PICTURE = f"![SQNR by layer and module]({PICTURE})"
BASE_NOTE = "What follows was written for the base model: its commands load that one, and its results are that one's."
# Tags that say how a quantized source was stored.
_OURS = re.compile(rf"{'|'.join(LAYOUTS)}|fp8|mxfp4|\d-bit|quantconvert")
_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def base_model(plan: Plan) -> str | None:
    """The repository id of the model that was quantized: asked for, a Hub id, or what cache or config say.

    None where only a folder is known: its name may be private, and would be taken for a repository of that name.
    """
    if plan.job.base_model:
        return printable(plan.job.base_model, newlines=False)
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
    return named if isinstance(named, str) and _REPOSITORY.fullmatch(named) else None


def method(plan: Plan) -> str:
    """How the weights were made, in a few words."""
    if plan.job.operation == "repack":
        return "codes, scales and zero points of the source in another layout"
    if plan.job.operation == "dequantize":
        return "(code - zero point) * scale, rounded once"
    decoded = f", from weights decoded from {plan.source_format}" if plan.source_format else ""
    known = f", statistics of {plan.statistics.num_tokens} tokens" if plan.statistics else ", no calibration data"
    return f"{METHODS.find(plan.job.method).words}{known}{decoded}"


def columns(plan: Plan) -> str | None:
    """What was done to columns before, in a few words; None where that is nothing."""
    if plan.job.rotate:
        return f"rotated by Hadamard matrices ({plan.job.rotate})"
    if plan.factors is None:
        return None
    how = f"SmoothQuant, alpha {plan.job.smooth:g}" if plan.job.smooth is not None else "equalized"
    return f"{how}, {plan.factors}; undone exactly by the layer before"


def command_of(plan: Plan) -> str:
    """The command that makes the same result: only what differs from the defaults, and no folder's name."""
    job, checkpoint = plan.job, plan.checkpoint
    verb = [] if job.operation == "convert" else [job.operation]
    source = [checkpoint.location, "OUT", "--revision", checkpoint.revision] if checkpoint.revision else ["SRC", "OUT"]
    own = ["--dtype", job.dtype] if job.dtype not in (None, DEFAULT_DTYPE) else []
    own += ["--activations", job.activations] if job.activations else []
    again = ["--requantize"] if job.requantize and plan.source_format else []
    again += ["--allow-incomplete"] if any(note.startswith("--allow-incomplete") for note in plan.notes) else []
    return shlex.join(map(str, ["quantconvert", *verb, *source, *own, *job.words(), *again]))


def load_hint(plan: Plan, out: str) -> list[str]:
    """Commands that load the result; only those that work for this model and layout."""
    return load_lines(plan.loadable, out, plan.job.engines)


def render_card(plan: Plan, quality: Quality | None = None) -> str:
    """README.md of the result, without tokens; the source card's own text follows under a heading of its own.

    quality: how far the weights are from their source, where they were quantized.
    """
    old_metadata, old_text = split_card(plan.checkpoint.card)
    base = base_model(plan)
    name = (base or plan.checkpoint.model_type or "model").rpartition("/")[2]
    title = f"# {printable(name, newlines=False)}, {'quantized' if plan.scheme else 'dequantized'}"
    parts = [
        f"---\n{metadata_block(_metadata(plan, old_metadata, base))}---\n\n{title}\n",
        "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in _rows(plan, base)),
        *_loading(plan),
        "## How it was made\n\n" + fenced("bash", printable(command_of(plan))),
        *([_quality_text(quality)] if quality else []),
    ]
    old_text = re.split(rf"(?m)^#+ {BASE_CARD}$", old_text)[-1].replace(BASE_NOTE, "").replace(_PICTURE, "").strip()
    if old_text:
        parts.append(f"## {BASE_CARD}\n\n{BASE_NOTE}\n\n{demoted(old_text, 3)}\n")
    return redacted("\n".join(parts))


def _metadata(plan: Plan, old: dict[str, object], base: str | None) -> dict[str, object]:
    """The source card's metadata with our tags and, where it is known, whose quantization this is."""
    kind = [plan.format, f"{plan.scheme.num_bits}-bit"] if plan.scheme else []
    tags = [tag for tag in tags_of(old) if not (plan.source_format and _OURS.fullmatch(tag))]
    metadata = {k: v for k, v in old.items() if k not in ("model-index", "base_model", "base_model_relation")}
    metadata |= {"base_model": base} if base else {}
    metadata |= {"tags": list(dict.fromkeys([*tags, *kind, "quantconvert"]))}
    if base and plan.scheme:  # the Hub has no word for going back
        metadata["base_model_relation"] = "quantized"
    return metadata


def _rows(plan: Plan, base: str | None) -> list[tuple[str, str]]:
    revision = plan.checkpoint.revision
    saved = f"{size(plan.checkpoint.nbytes)} -> {size(plan.total_size)}"
    rows = [
        ("scheme", ", ".join(f"{s.label} ({n} weights)" for s, n in plan.schemes.items()) or "none"),
        ("format", plan.format + (f": {LAYOUTS.find(plan.format).summary}" if plan.scheme else "")),
        ("method", method(plan)),
        *([("columns", said)] if (said := columns(plan)) else []),
        ("size", f"{saved}, {plan.bits_per_weight:.2f} bits per weight"),
        ("kept in high precision", kept_summary(plan)),
        ("made with", f"quantconvert {__version__}"),
    ]
    return [("base model", base + (f" at revision `{revision}`" if revision else "")), *rows] if base else rows


def _loading(plan: Plan) -> list[str]:
    """Commands for a shell, and Python that runs as it is, for what loads this result."""
    blocks = [fenced(language, code) for language, code in snippets(plan.loadable, "PATH", plan.job.engines)]
    if not blocks:
        return [f"## Load it\n\nAs things stand {NOBODY}.\n"]
    return ["## Load it\n\nReplace `PATH` by this repository or folder.\n\n" + "\n".join(blocks)]


def _quality_text(quality: Quality) -> str:
    return (
        "## Quality\n\n"
        "Signal to quantization noise (SQNR) of the stored weights against the source; quantconvert.json has that of "
        "each weight.\n\n| | SQNR |\n|---|---|\n"
        f"| mean of {quality.num_weights} weights | {quality.mean_sqnr:.1f} dB |\n"
        f"| worst, `{printable(quality.worst_name, newlines=False)}` | {quality.worst_sqnr:.1f} dB |\n\n"
        f"{_PICTURE}\n"
    )


def kept_summary(plan: Plan) -> str:
    """`2 embedding, 9 norm`: how many tensors stay, by reason."""
    counts: dict[str, int] = {}
    for task in plan.kept:
        counts[str(task.reason)] = counts.get(str(task.reason), 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
