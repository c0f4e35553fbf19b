"""The one place for output: stdout is data, stderr is talk; tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict
from textwrap import wrap
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantconvert.api import Result
from quantconvert.card import columns, load_hint, method
from quantconvert.engines import NOBODY
from quantconvert.families import REASON_TEXT
from quantconvert.inventory import Inventory
from quantconvert.kernels import kernel_label
from quantconvert.methods import METHODS
from quantconvert.observation import Observation
from quantconvert.planning import Plan
from quantconvert.text import clean, counted, duration, escaped_json, redacted, size
from quantconvert.verification import TensorError, Verification

LOG_WIDTH = 160  # where there is no terminal to ask
VERBATIM = ("load it", "")  # what is to be copied


def _console(stream: TextIO) -> Console:
    """Plain where there is no terminal or NO_COLOR is set; text of ours is never taken for emoji or numbers."""
    return Console(
        stderr=stream is sys.stderr,
        soft_wrap=True,
        highlight=False,
        emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if stream.isatty() else LOG_WIDTH,
    )


stdout, stderr = _console(sys.stdout), _console(sys.stderr)


def plain(text: str) -> str:
    """Text for `print` of the consoles: no markup, no control characters, no tokens, whatever it came from."""
    return escape(clean(text))


def print_json(value: object) -> None:
    """Data for programs, plain whatever the terminal."""
    print_text(redacted(escaped_json(json.dumps(value, indent=2, ensure_ascii=False))) + "\n")


def print_text(text: str) -> None:
    """Data as it is."""
    sys.stdout.write(text)


def flush_stdout() -> None:
    """Write what is still to be written, while an error can still be reported."""
    sys.stdout.flush()


def print_facts(console: Console, rows: list[tuple[str, str]]) -> None:
    """`key  value` lines. On a terminal long values go on below their beginning; commands stay whole, to be copied."""
    width = max(len(key) for key, _ in rows)
    room = console.width - width - 2 if console.is_terminal else 0
    for key, value in rows:
        text = plain(value)
        if room > 20 and key not in VERBATIM and len(text) > room:
            text = ("\n" + " " * (width + 2)).join(wrap(text, room, break_long_words=False, break_on_hyphens=False))
        console.print(f"[bold]{plain(key):<{width}}[/bold]  {text}")


def kept_rows(plan: Plan) -> list[tuple[str, str]]:
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
    for i, hint in enumerate(load_hint(plan, str(result.out)) or [NOBODY]):
        rows.append(("load it" if i == 0 else "", hint))
    print_facts(stderr, rows)
    stderr.print(f"[green]done[/green] {plain(str(result.out))}")


def result_json(result: Result) -> dict[str, object]:
    """The summary for programs: the plan's totals and what the run took, without the list of tensors."""
    values = result.plan.to_json()
    del values["tensors"]
    return values | {
        "out": str(result.out),
        "seconds": round(result.seconds, 3),
        "cpu_seconds": round(result.cpu_seconds, 3),
        "peak_rss_nbytes": result.peak_rss_nbytes,
        "kernel": kernel_label(),
        "quality": asdict(result.quality) if result.quality else None,
        "factors": result.factors.to_json() if result.factors else None,
    }


def print_verification(found: Verification, verbose: bool) -> None:
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
    if verbose and found.errors:
        stdout.print(_error_table(found))
    print_facts(stdout, rows)
    for finding in found.findings:
        stderr.print(f"[red]{finding.check}:[/red] {plain(finding.where)}: {plain(finding.message)}")


def _worst(found: Verification) -> TensorError:
    return min(found.errors, key=lambda error: error.sqnr if error.sqnr is not None else float("inf"))


def _compared(found: Verification) -> str:
    """`28 weights and 11 other tensors compared`."""
    weights = f"{counted(len(found.errors), 'quantized weight')} and " if found.errors else ""
    return f"{weights}{counted(found.num_equal, 'other tensor')} compared with the source"


def _error_text(error: TensorError) -> str:
    sqnr = "no noise" if error.sqnr is None else f"{error.sqnr:.1f} dB SQNR"
    return f"{sqnr}, relative error {error.relative_error:.3g}, at most {error.max_error:.3f} steps off"


def _error_table(found: Verification) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("weight", "scheme", "SQNR dB", "relative error", "max error in steps"):
        table.add_column(name, overflow="fold")
    for error in found.errors:
        sqnr = "-" if error.sqnr is None else f"{error.sqnr:.2f}"
        table.add_row(plain(error.name), error.scheme, sqnr, f"{error.relative_error:.3g}", f"{error.max_error:.4f}")
    return table


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
    stderr.print(f"[green]done[/green] {plain(str(found.out))}")


def print_inventory(inventory: Inventory, verbose: bool) -> None:
    """What a checkpoint holds, on stdout."""
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
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("tensor (N = any number)", "dtype", "shape", "count", "size"):
        table.add_column(name, overflow="fold")
    shown = inventory.templates if verbose else inventory.templates[:40]
    for row in shown:
        shape = "x".join(map(str, row.shapes[0])) + (f" and {len(row.shapes) - 1} more" if len(row.shapes) > 1 else "")
        table.add_row(plain(row.template), row.dtype, shape, str(row.num_tensors), size(row.nbytes))
    stdout.print()
    stdout.print(table)
    if len(shown) < len(inventory.templates):
        stdout.print(f"... and {len(inventory.templates) - len(shown)} more kinds (--verbose shows all)")
