"""What was decided, done and found, for people: stdout is data, stderr is talk; and a result as JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING

from quantconvert.card import columns, load_hint, method
from quantconvert.cli.lines import Lines, stderr, stdout
from quantconvert.engines import NOBODY
from quantconvert.families import REASON_TEXT
from quantconvert.kernels import kernel_label
from quantconvert.methods import METHODS
from quantconvert.run.part import ALL
from quantconvert.text import clean, counted, duration, size

if TYPE_CHECKING:
    from quantconvert.comparison.outcome import Comparison
    from quantconvert.conversion import Result
    from quantconvert.inventory import Inventory
    from quantconvert.observation import Observation
    from quantconvert.pipeline import PipelineResult
    from quantconvert.planning import Plan
    from quantconvert.run.outlet import Published
    from quantconvert.verification import TensorError, Verification

VERBATIM = ("load it", "")  # what is to be copied


def print_facts(lines: Lines, rows: list[tuple[str, str]]) -> None:
    """`key  value` lines. On a terminal long values go on below their beginning; commands stay whole, to be copied."""
    width = max(len(key) for key, _ in rows)
    room = lines.width - width - 2 if lines.is_terminal else 0
    for key, value in rows:
        text = clean(value)
        if room > 20 and key not in VERBATIM and len(text) > room:
            text = ("\n" + " " * (width + 2)).join(wrap(text, room, break_long_words=False, break_on_hyphens=False))
        lines.print(f" {text}", label=f"{clean(key):<{width}}")


def kept_rows(plan: Plan) -> list[tuple[str, str]]:
    """How many tensors stay in high precision, by reason."""
    groups: dict[str, list[int]] = defaultdict(list)
    for task in plan.kept:
        groups[str(task.reason)].append(task.source.nbytes)
    return [
        ("kept", f"{len(plan.kept)} of {len(plan.tasks)} tensors in high precision"),
        *(
            (f"  {reason}", f"{counted(len(sizes), 'tensor')}, {size(sum(sizes))}: {REASON_TEXT[reason]}")
            for reason, sizes in sorted(groups.items(), key=lambda item: -sum(item[1]))
        ),
    ]


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Source, format and schemes."""
    family = plan.family or "unknown"
    schemes = ", ".join(f"{scheme.label} ({count} weights)" for scheme, count in plan.schemes.items())
    return [
        ("source", f"{plan.checkpoint.location}: {plan.checkpoint.model_type or 'no model_type'} (family {family})"),
        ("format", f"{plan.format}: {plan.format_reason}"),
        ("scheme", schemes or "none"),
    ]


def method_rows(plan: Plan) -> list[tuple[str, str]]:
    """What is more than plain rounding."""
    rows = []
    if plan.scheme and (METHODS[plan.job.method].needs != "nothing" or plan.statistics):
        rows.append(("method", method(plan)))
    if said := columns(plan):
        rows.append(("columns", said))
    return rows


def size_rows(plan: Plan) -> list[tuple[str, str]]:
    """Bytes, bits a weight, and what `--target-bits` has spent."""
    saved = plan.total_size / max(1, plan.checkpoint.nbytes)
    return [
        ("size", f"{size(plan.checkpoint.nbytes)} -> {size(plan.total_size)} ({saved:.1%}), "
                 f"{counted(len(plan.shards), 'file')}"),
        ("bits per weight", f"{plan.bits_per_quantized_weight:.3f} in quantized layers, "
                            f"{plan.bits_per_weight:.3f} overall"),
        *(plan.budget.rows() if plan.budget else ()),
    ]  # fmt: skip


def accounts(plan: Plan) -> str:
    """`92 in the source: 45 quantized, 45 partners, 2 copied`."""
    parts = [f"{count} {kind}" for kind, count in sorted(plan.accounts.items(), key=lambda item: -item[1])]
    return f"{len(plan.checkpoint.tensors)} in the source: {', '.join(parts)}"


def print_result(result: Result) -> None:
    """The summary of a conversion, on stderr."""
    plan = result.plan
    if result.part != ALL:
        count = sum(result.part.has(number) for number in range(len(plan.shards)))
        files = f"{result.part}: {counted(count, 'file')} of {len(plan.shards)}"
        ends = "`quantconvert finish OUT`, or the same command without --shards, when all parts are there"
        print_facts(stderr, [("shards", files), ("finish", ends)])
        return
    rows = plan_rows(plan) + size_rows(plan)
    rows.append(("tensors", accounts(plan)))
    rows += kept_rows(plan)
    rows += method_rows(plan)
    if result.factors is not None:
        rows.append(("factors", str(result.factors)))
    if result.quality is not None:
        unweighted = " (of all columns alike, which this method does not weigh alike)"
        needs = METHODS[plan.job.method].needs != "nothing"
        rows.append(("quality", str(result.quality) + (unweighted if needs else "")))
    if result.verification is not None:
        rows.append(("verified", _compared(result.verification)))
    speed = plan.checkpoint.nbytes / max(result.seconds, 1e-9)
    rows.append(("time", f"{duration(result.seconds)} ({duration(result.cpu_seconds)} of CPU), {size(speed)}/s"))
    rows.append(("peak memory", f"{size(result.peak_rss_nbytes)}, Python included"))
    place = result.published.repo_id if result.published else str(result.out)
    for i, hint in enumerate(load_hint(plan, place) or [NOBODY]):
        rows.append(("load it" if i == 0 else "", hint))
    print_facts(stderr, rows)
    if result.published:
        print_published(result.published)
    else:
        stderr.print(str(result.out), label="done", style="green")


def print_pipeline(result: PipelineResult) -> None:
    """A line for each component, on stderr."""
    rows = []
    for name, part in result.components.items():
        if part is None:
            rows.append((name, "was done by the run before"))
            continue
        plan, quality = part.plan, f", {part.quality}" if part.quality else ""
        sizes = f"{size(plan.checkpoint.nbytes)} -> {size(plan.total_size)}"
        rows.append((name, f"{plan.format}, {', '.join(s.label for s in plan.schemes)}: {sizes}{quality}"))
    names = ", ".join(dict.fromkeys(path.split("/")[0] for path in result.carried))
    rows.append(("carried over", f"{names} ({counted(len(result.carried), 'file')})"))
    print_facts(stderr, rows)
    stderr.print(str(result.out), label="done", style="green")


def print_published(done: Published) -> None:
    """What became visible where, on stderr."""
    sent = f"{counted(done.num_sent, 'file')} of weights, {size(done.nbytes_sent)}"
    print_facts(stderr, [("repository", done.repo_id), ("sent", sent), ("commit", done.commit)])
    stderr.print(done.url, label="done", style="green")


def result_json(result: Result) -> dict[str, object]:
    """The summary for programs: the plan's totals and what the run took, without the list of tensors."""
    values = result.plan.to_json()
    del values["tensors"]
    return values | {
        "out": None if result.published else str(result.out),
        "published": asdict(result.published) if result.published else None,
        "seconds": round(result.seconds, 3),
        "cpu_seconds": round(result.cpu_seconds, 3),
        "peak_rss_nbytes": result.peak_rss_nbytes,
        "kernel": kernel_label(),
        "quality": asdict(result.quality) if result.quality else None,
        "factors": result.factors.to_json() if result.factors else None,
    }


def print_comparison(found: Comparison) -> None:
    """How far a result is from its source when it speaks, on stdout."""
    rows = [("checkpoint", found.location), ("source", found.source or "not given: --source SRC compares")]
    rows.append(("tokens", str(found.num_tokens)))
    if found.kl is not None and found.top1 is not None:
        rows += [("KL divergence", f"{found.kl:.4f} nats a token"), ("same top token", f"{100 * found.top1:.1f} %")]
    if found.perplexity is not None:
        before = "" if found.source_perplexity is None else f", {found.source_perplexity:.4g} of the source"
        rows.append(("perplexity", f"{found.perplexity:.4g}{before}"))
    if found.cosine is not None and found.worst_cosine is not None:
        rows.append(("embeddings", f"cosine {found.cosine:.5f}, {found.worst_cosine:.5f} at worst"))
    if found.max_kl is not None:
        rows.append(("result", "ok" if found.is_ok else f"farther than --max-kl {found.max_kl:g} allows"))
    print_facts(stdout, rows)


def print_verification(found: Verification, verbose: bool, attested: str | None = None) -> None:
    """What was checked and how far the weights are, on stdout; everything that is wrong, on stderr."""
    count = (
        f"{counted(found.num_checksums, 'file')} as the conversion left {'it' if found.num_checksums == 1 else 'them'}"
    )
    rows = [
        ("checkpoint", f"{found.location}: {found.num_tensors} tensors in {counted(found.num_files, 'file')}"),
        ("checksums", count if found.num_checksums else "none: no quantconvert.json that can be read"),
    ]
    if found.source:
        rows.append(("source", f"{found.source}: {_compared(found)}"))
    if found.errors:
        worst = _worst(found)
        rows.append(("worst weight", f"{worst.name}: {_error_text(worst)}"))
    wrong = f"failed at {found.failed}: {counted(len(found.findings), 'finding')}"
    rows.append(("result", "ok" if found.is_ok else wrong))
    if attested and found.is_ok:
        rows.append(("attested", attested))
    if verbose and found.errors:
        _print_errors(found)
    print_facts(stdout, rows)
    for finding in found.findings:
        stderr.print(f"{finding.where}: {finding.message}", label=f"{finding.check}:", style="red")


def _worst(found: Verification) -> TensorError:
    return min(found.errors, key=lambda error: error.sqnr if error.sqnr is not None else float("inf"))


def _compared(found: Verification) -> str:
    """`28 weights and 11 other tensors compared`."""
    weights = f"{counted(len(found.errors), 'quantized weight')} and " if found.errors else ""
    return f"{weights}{counted(found.num_equal, 'other tensor')} compared with the source"


def _error_text(error: TensorError) -> str:
    sqnr = "no noise" if error.sqnr is None else f"{error.sqnr:.1f} dB SQNR"
    return f"{sqnr}, relative error {error.relative_error:.3g}, at most {error.max_error:.3f} steps off"


def _print_errors(found: Verification) -> None:
    from quantconvert.cli.tables import print_table

    rows = []
    for error in found.errors:
        sqnr = "-" if error.sqnr is None else f"{error.sqnr:.2f}"
        rows.append((error.name, error.scheme, sqnr, f"{error.relative_error:.3g}", f"{error.max_error:.4f}"))
    print_table(("weight", "scheme", "SQNR dB", "relative error", "max error in steps"), rows)


def print_observation(found: Observation) -> None:
    """What was observed, on stderr."""
    module, largest = found.largest
    missing = ", ".join(found.unobserved[:4]) + (" and more" if len(found.unobserved) > 4 else "")
    print_facts(stderr, [
        ("layers", f"{found.num_layers}, {'one at a time' if found.by_layers else 'all in memory'}"),
        ("inputs", f"{found.num_inputs} of {found.num_modules} linear layers"),
        ("not observed", missing or "none"),
        ("tokens", str(found.num_tokens)),
        ("largest", f"{largest:.4g} ({module})"),
        ("size", size(found.nbytes)),
        ("time", duration(found.seconds)),
    ])  # fmt: skip
    stderr.print(str(found.out), label="done", style="green")


def print_inventory(inventory: Inventory, verbose: bool) -> None:
    """What a checkpoint holds, on stdout."""
    from quantconvert.cli.tables import print_table

    kind = f"{inventory.model_type or 'no model_type'} (family {inventory.family or 'unknown'})"
    rows = [
        ("checkpoint", f"{inventory.location}: {kind}"),
        ("quantized", f"{inventory.quant_method or 'no'}"
                      + (f", {inventory.num_quantized_modules} modules" if inventory.num_quantized_modules else "")),
        *(("  scheme", line) for line in inventory.schemes),
        ("tensors", f"{inventory.num_tensors} in {counted(inventory.num_files, 'file')}, {size(inventory.nbytes)}"),
        *((f"  {row.dtype}", f"{counted(row.num_tensors, 'tensor')}, {size(row.nbytes)}") for row in inventory.dtypes),
    ]  # fmt: skip
    print_facts(stdout, rows)
    shown, lines = inventory.templates if verbose else inventory.templates[:40], []
    for row in shown:
        shape = "x".join(map(str, row.shapes[0])) + (f" and {len(row.shapes) - 1} more" if len(row.shapes) > 1 else "")
        lines.append((row.template, row.dtype, shape, str(row.num_tensors), size(row.nbytes)))
    stdout.print()
    print_table(("tensor (N = any number)", "dtype", "shape", "count", "size"), lines)
    if len(shown) < len(inventory.templates):
        stdout.print(f"... and {len(inventory.templates) - len(shown)} more kinds (--verbose shows all)")
