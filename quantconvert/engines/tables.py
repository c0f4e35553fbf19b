"""The README's tables of engines, from the rows: `python -m quantconvert.engines`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantconvert.engines import ENGINES, titles
from quantconvert.engines.row import Engine, Loadable
from quantconvert.families import FAMILIES
from quantconvert.schemes import BLOCK, Scheme, Strategy


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the table: the schemes that it speaks of, all of them in one model where `mixed`."""

    layout: str
    scheme: str
    schemes: tuple[Scheme, ...]
    mixed: bool = False

    def loadables(self, family: str, experts: bool = False) -> list[Loadable]:
        sets = [self.schemes] if self.mixed else [(scheme,) for scheme in self.schemes]
        return [Loadable(self.layout, schemes, family, experts) for schemes in sets]


def _schemes(bits: int, symmetric: bool, *widths: int) -> tuple[Scheme, ...]:
    """Of widths as `--group-size` says them: -1 per channel."""

    def scheme(width: int) -> Scheme:
        strategy: Strategy = "group" if width > 0 else "channel"
        return Scheme(bits, symmetric, strategy, width if width > 0 else None)

    return tuple(map(scheme, widths))


_GROUPS = (32, 64, 128)
_W8A8 = (Scheme(8, True, "channel", None, True), Scheme(8, True, "tensor", None, True))
_W4A8 = tuple(replace(scheme, activations=True) for scheme in _schemes(4, True, *_GROUPS, -1))
_FP8 = (
    Scheme(8, True, "channel", None, True, "float"),
    Scheme(8, True, "tensor", None, True, "float"),
    Scheme(8, True, "block", None, True, "float", block=BLOCK),
)
_BOTH = (*_schemes(4, True, *_GROUPS), *_schemes(4, False, *_GROUPS))
LINES = (
    _Line("awq", "int4 g32/64/128, symmetric or not", _BOTH),
    _Line("awq", "int4 channel", _schemes(4, False, -1)),
    _Line("compressed-tensors", "int4 symmetric, group or channel", _schemes(4, True, *_GROUPS, -1)),
    _Line("compressed-tensors", "int4 asymmetric, group or channel", _schemes(4, False, *_GROUPS, -1)),
    _Line("compressed-tensors", "int8 symmetric, group or channel", _schemes(8, True, *_GROUPS, -1)),
    _Line("compressed-tensors", "int8 asymmetric, group or channel", _schemes(8, False, *_GROUPS, -1)),
    _Line("compressed-tensors", "W8A8, channel or tensor", _W8A8),
    _Line("compressed-tensors", "W4A8, group or channel", _W4A8),
    _Line("compressed-tensors", "W4AFP8, g128", (replace(_W4A8[2], input_type="float"),)),
    _Line("compressed-tensors", "several symmetric schemes", _schemes(4, True, 128) + _schemes(8, True, -1), True),
    _Line("gptq", "int4 symmetric, group", _schemes(4, True, *_GROUPS)),
    _Line("gptq", "int8 symmetric, group", _schemes(8, True, *_GROUPS)),
    _Line("gptq", "int4, int8 channel", _schemes(4, True, -1) + _schemes(8, True, -1)),
    _Line("gptq", "asymmetric (gptq_v2)", _schemes(4, False, *_GROUPS)),
    _Line("gptq", "several symmetric schemes", _schemes(4, True, 128) + _schemes(8, True, 128), True),
    _Line("compressed-tensors", "FP8_DYNAMIC, channel or tensor", _FP8[:2]),
    _Line("compressed-tensors", "FP8_BLOCK", _FP8[2:]),
    _Line("compressed-tensors", "FP8A16, channel", (Scheme(8, True, "channel", type="float"),)),
    _Line("compressed-tensors", "NVFP4A16", (Scheme(4, True, "group", 16, type="float", scales="e4m3"),)),
    _Line("compressed-tensors", "MXFP4A16", (Scheme(4, True, "group", 32, type="float", scales="e8m0"),)),
    _Line("compressed-tensors", "MXFP8, MXFP8A16", (Scheme(8, True, "group", 32, type="float", scales="e8m0"),)),
    _Line("fp8", "FP8_BLOCK", _FP8[2:]),
    _Line("mlx", "int4 g32/64/128; int8 symmetric", (*_BOTH, *_schemes(8, True, *_GROUPS))),
    _Line("rtn", "all", _schemes(4, True, 128, -1) + _schemes(8, False, 128, -1)),
)
# Families of which nothing particular is known: what is said of them is said of a layout and its schemes.
_DENSE, _EXPERTS = "llama", "qwen-moe"


def what_loads_where() -> str:
    """A line for each layout and scheme, a column for each engine."""
    engines = list(ENGINES.values())
    head = ["format", "scheme", *(f"{engine.title} {engine.version}" for engine in engines)]
    rows = [[f"`{line.layout}`", line.scheme, *(_cell(engine, line) for engine in engines)] for line in LINES]
    return _table(head, rows)


def _cell(engine: Engine, line: _Line) -> str:
    """`yes`, or `dense` where experts do not load, with conditions; bold where a test of ours loads it."""
    dense, experts = line.loadables(_DENSE), line.loadables(_EXPERTS, experts=True)
    if not all(map(engine.loads, dense)):
        return "-"
    found = [[row for row, _ in engine.found(loadable)] for loadable in dense]
    word = "yes" if all(map(engine.loads, experts)) else "dense"
    evidence = [row.evidence for rows in found for row in rows if row.verdict == "loads"]
    word = f"**{word}**" if all(text.startswith("tests/") for text in evidence) else word
    common = [] if line.mixed else [row.short for row in found[0] if all(row in rows for rows in found)]
    exceptions = [row.short for row in engine.rows if row.when.families and line.layout in row.when.layouts]
    return ", ".join(dict.fromkeys([word, *filter(None, [*common, *exceptions])]))


def what_auto_writes() -> str:
    """The choices of `--format auto` where no engine is named, with the families that it makes an exception for."""
    verdict = ENGINES["transformers"].verdict
    passed: dict[str, list[str]] = {"refuses": [], "wrong": []}
    for family in FAMILIES:
        awq, packed = (
            Loadable(layout, _schemes(4, True, 128), family.name) for layout in ("awq", "compressed-tensors")
        )
        if not family.experts and verdict(awq) != "loads" and verdict(packed) != "wrong":
            passed[verdict(awq)].append(family.name)
    random = ", ".join(passed["wrong"])
    everyone = titles(list(ENGINES.values()))
    rows = [
        [
            "int4, group 32/64/128, dense, a family with a table, every out_features % 8 == 0",
            "`awq`, asymmetric unless `--symmetric`",
            f"packed along the output dimension; the one asymmetric int4 layout that {everyone} all load",
        ],
        [
            "int4 otherwise: experts, per channel, several schemes, other group sizes or widths, families without a "
            f"table; {random}, {', '.join(passed['refuses'])}",
            "`compressed-tensors`, symmetric",
            f"AWQ experts load as random numbers in transformers, and so do {random}; the other families named stop it",
        ],
        ["int8", "`compressed-tensors`, symmetric", "the only int8 weight-only layout that loads widely"],
        ["W8A8, W4A8", "`compressed-tensors` (int-quantized, pack-quantized), symmetric", "the same"],
    ]
    return _table(["asked", "written", "why"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        ("|" + "|".join(line) + "|\n") if line[0] == "---" else f"| {' | '.join(line)} |\n" for line in lines
    )
