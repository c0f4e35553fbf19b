"""Markdown for model cards: code in fences, and a text that becomes a part of another."""

from __future__ import annotations

import re


def fenced(language: str, text: str) -> str:
    """A block of code; the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"


_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}(#{1,6})(?=\s|$)(.*)")
_HTML_HEADING = re.compile(r"(?i)(</?h)([1-6])\b")


def demoted(text: str, top: int) -> str:
    """Markdown whose highest heading is of level `top`: one document has one first heading, and this is a part."""
    lines, levels = _headings(text.splitlines())
    shift = max(0, top - min((level for level in levels if level), default=top))
    for i, level in enumerate(levels):
        if level and lines[i].lstrip().startswith("#"):
            lines[i] = "#" * min(6, level + shift) + lines[i].lstrip()[level:]
        elif level:
            lines[i] = _HTML_HEADING.sub(lambda m: f"{m[1]}{min(6, int(m[2]) + shift)}", lines[i])
    return "\n".join(lines)


def _headings(lines: list[str]) -> tuple[list[str], list[int]]:
    """The lines, underlined headings written with `#`, and the level of each that is a heading (else 0)."""
    out: list[str] = []
    levels: list[int] = []
    fence = ""
    for line in lines:
        mark = _FENCE.match(line)
        level = 0
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
        elif mark:
            fence = mark[1]
        elif heading := _HEADING.match(line):
            level = len(heading[1])
        elif html := _HTML_HEADING.search(line):
            level = int(html[2])
        elif re.fullmatch(r"=+\s*|-+\s*", line) and out and _is_text(out[-1]) and not levels[-1]:
            levels[-1] = 1 if line[0] == "=" else 2
            out[-1] = f"{'#' * levels[-1]} {out[-1].strip()}"
            continue
        out.append(line)
        levels.append(level)
    return out, levels


def _is_text(line: str) -> bool:
    """Whether a line can be the text of an underlined heading: no list, table, quote or indented code."""
    return re.match(r" {0,3}[^\s>|*+`~<-]", line) is not None
