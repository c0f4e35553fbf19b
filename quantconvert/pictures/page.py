"""One page that needs nothing else: no request (its policy forbids each), no time, no path; the same bytes for the same
result. Names come from strangers: jinja2 escapes them all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from quantconvert.pictures.facts import Facts, Place, delta, difference, moved
from quantconvert.pictures.svg import DIVERGING, bars, colour, heat_map, level, span
from quantconvert.text import one_line, size


def page(facts: Facts, other: Facts | None = None) -> str:
    """HTML of a result, beside another one where that is given. Below 300 kB for 45,000 weights."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("quantconvert.pictures")
    style, script = (here.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("page.html.j2").read_text("utf-8"))
    experts = _experts(facts)
    return template.render(
        facts=facts,
        other=other,
        title=_title(facts),
        other_title=_title(other) if other else None,
        policy=Markup(f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"),
        style=Markup(style),
        script=Markup(script),
        experts=Markup(_embedded(experts)) if experts else None,
        heat_map=Markup(heat_map(facts.rows)),
        bins=Markup(bars([(f"{a:g} to {b:g} dB", n, str(n)) for a, b, n in facts.histogram])),
        role_bars=Markup(bars(_role_bars(facts))),
        difference=Markup(_difference(facts, other)) if other else None,
        moved=moved(facts, other) if other else (),
        made=made_rows(facts),
        size=size,
        clean=one_line,
        db=lambda value: f"{value:.1f} dB",
    )


def _title(facts: Facts) -> str:
    name = _object(facts, "source").get("repository")
    return one_line(f"{name or 'A model'}, {facts.made.get('format', 'converted')}")


def _role_bars(facts: Facts) -> list[tuple[str, float, str]]:
    """Before and after, one bar each."""
    rows = []
    for role in facts.sizes:
        rows.append((f"{role.role}, before", float(role.source_nbytes), size(role.source_nbytes)))
        rows.append((f"{role.role}, after", float(role.nbytes), size(role.nbytes)))
    return rows


def _difference(facts: Facts, other: Facts) -> str:
    """White is equal: the scale reaches as far to both sides."""
    rows, better = difference(facts, other), delta(other)
    if not rows:
        return "<p>No weight is in both.</p>"
    most = max(map(abs, span(rows, better)))
    return heat_map(rows, better, DIVERGING, ends=(-most, most))


def made_rows(facts: Facts) -> list[tuple[str, str]]:
    """Schemes, rules, versions, digests and the command, as text."""
    made, job, source = facts.made, _object(facts, "job"), _object(facts, "source")
    rows = [
        ("command", made.get("command")),
        ("schemes", ", ".join(f"{scheme} ({count} weights)" for scheme, count in facts.schemes.items())),
        ("rules", job.get("rules") and json.dumps(job["rules"])),
        ("ignore", job.get("ignore") and json.dumps(job["ignore"])),
        ("method", job.get("method")),
        ("format", made.get("format")),
        ("source", source.get("repository")),
        ("commit", source.get("revision")),
        ("source's layout, sha256", source.get("layout_sha256")),
        ("plan, sha256", made.get("plan_sha256")),
        ("quantconvert", made.get("quantconvert_version")),
    ]
    return [(key, str(value)) for key, value in rows if value]


def _object(facts: Facts, key: str) -> Mapping[str, Any]:
    """An object of quantconvert.json; empty where it is none."""
    value = facts.made.get(key)
    return value if isinstance(value, dict) else {}


def _experts(facts: Facts) -> dict[str, Any] | None:
    """Tenths of dB of each expert by module and layer, as two base-36 digits (`--`: none); None without experts."""
    found: dict[str, dict[str, dict[int, float | None]]] = {}
    for weight in facts.weights:
        place = Place.of(weight.name)
        if place.expert is not None and place.layer is not None and place.expert < 10_000:
            name = one_line(f"{place.stack}: {place.part}")
            found.setdefault(name, {}).setdefault(str(place.layer), {})[place.expert] = weight.sqnr
    if not found:
        return None
    low, high = span(facts.rows, level)
    rows = {
        name: {layer: "".join(_digits(values.get(i)) for i in range(max(values) + 1)) for layer, values in row.items()}
        for name, row in found.items()
    }
    ends = {"low": round(low - 1, 2), "high": round(high + 1, 2)}
    return {"rows": rows, **ends, "colours": [colour(i / 63) for i in range(64)]}


def _digits(value: float | None) -> str:
    if value is None:
        return "--"
    tenths, digits = min(max(round(10 * value), 0), 36 * 36 - 1), "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[tenths // 36] + digits[tenths % 36]


def _embedded(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
