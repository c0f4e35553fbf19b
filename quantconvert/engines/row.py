"""What is known of an engine, as values: which checkpoints it loads, refuses, or loads with wrong numbers."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from quantconvert.number import Kind
from quantconvert.schemes import Scheme, Strategy

Verdict = Literal["loads", "refuses", "wrong"]
PLAIN = "plain"
KERNEL_GROUPS = (32, 64, 128)  # what the engines' GPU kernels for AWQ and GPTQ are built for
FLOAT_WIDTHS: tuple[Strategy, ...] = ("tensor", "channel", "block")


@dataclass(frozen=True, slots=True)
class Loadable:
    """A checkpoint as an engine meets it.

    layout: a registered one, or `plain`. schemes: of its quantized weights; none where it is plain. family: the name
    of the model's table, None without one. architecture: the first of config.json's `architectures`, or empty.
    """

    layout: str = PLAIN
    schemes: tuple[Scheme, ...] = ()
    family: str | None = None
    has_experts: bool = False
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class When:
    """Which checkpoints a row speaks of; what is left open does not matter.

    groups: group sizes, one of which is meant; other_groups: any group size but these. several: more than one scheme in
    the model. known: whether the family has a table. type: of numbers, whole ones unless told; None: any. inputs: the
    type of activations; None: any.
    """

    layouts: tuple[str, ...] = ()
    num_bits: int | None = None
    strategies: tuple[Strategy, ...] = ()
    groups: tuple[int, ...] = ()
    other_groups: tuple[int, ...] = ()
    symmetric: bool | None = None
    activations: bool | None = None
    several: bool | None = None
    experts: bool | None = None
    families: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    known: bool | None = None
    type: Kind | None = "int"
    inputs: Kind | None = None

    def matches(self, loadable: Loadable, scheme: Scheme | None) -> bool:
        """Whether the row speaks of `scheme` (None: a plain checkpoint) in `loadable`."""
        return self._model(loadable) and (self._scheme(scheme) if scheme else loadable.layout == PLAIN)

    def _model(self, loadable: Loadable) -> bool:
        return (
            (not self.layouts or loadable.layout in self.layouts)
            and self.several in (None, len(loadable.schemes) > 1)
            and self.experts in (None, loadable.has_experts)
            and (not self.families or loadable.family in self.families)
            and (not self.architectures or loadable.architecture in self.architectures)
            and self.known in (None, loadable.family is not None)
        )

    def _scheme(self, scheme: Scheme) -> bool:
        size = scheme.group_size
        return (
            self.type in (None, scheme.type)
            and self.num_bits in (None, scheme.num_bits)
            and (not self.strategies or scheme.strategy in self.strategies)
            and (not self.groups or size in self.groups)
            and (not self.other_groups or (size is not None and size not in self.other_groups))
            and self.symmetric in (None, scheme.symmetric)
            and self.activations in (None, scheme.activations)
            and self.inputs in (None, scheme.input_type or scheme.type)
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One fact about an engine.

    note: what the plan says after the engine's name, with `{width}` for the scheme's own (`group size 16`); empty where
    there is nothing to warn of. short: the same in the README's table. evidence: the test that shows it, or the file
    of the engine that says so. before, argument, packages: what a line of Python that loads it needs.
    """

    when: When
    verdict: Verdict
    evidence: str
    note: str = ""
    short: str = ""
    before: str = ""
    argument: str = ""
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelClass:
    """The class that loads models whose architecture's name ends in `ending`, of these families (none: of all)."""

    ending: str
    name: str
    families: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine and version: what it loads.

    name: as `--engine` takes it. load: the line that loads a checkpoint, with `{out}`, and in Python `{before}`,
    `{model_class}` and `{argument}`. module: where a line of Python has its names from; empty for a command. serves:
    whether it answers requests over a network. usual: whether its line is shown to those who named no engine. renamed:
    model type and patterns of its own names for layers that stay plain. signed: layouts of int4 whose scales its
    kernels multiply as they are, whatever their sign.
    """

    name: str
    title: str
    version: str
    load: str
    rows: tuple[Row, ...]
    module: str = ""
    serves: bool = False
    usual: bool = False
    classes: tuple[ModelClass, ...] = ()
    renamed: tuple[tuple[str, tuple[str, ...]], ...] = ()
    signed: tuple[str, ...] = ()

    def found(self, loadable: Loadable) -> list[tuple[Row, Scheme | None]]:
        """The rows that speak of `loadable`, with the first scheme that each speaks of."""
        schemes: tuple[Scheme | None, ...] = loadable.schemes or (None,)
        pairs = ((row, next((s for s in schemes if row.when.matches(loadable, s)), schemes)) for row in self.rows)
        return [(row, scheme) for row, scheme in pairs if not isinstance(scheme, tuple)]

    def unread(self, loadable: Loadable) -> list[Scheme | None]:
        """Schemes of which no row says that they load."""
        loads = [row.when for row in self.rows if row.verdict == "loads"]
        schemes: tuple[Scheme | None, ...] = loadable.schemes or (None,)
        return [s for s in schemes if not any(when.matches(loadable, s) for when in loads)]

    def verdict(self, loadable: Loadable) -> Verdict:
        """The worst that the rows say; what no row speaks of is refused."""
        verdicts = {row.verdict for row, _ in self.found(loadable)}
        if "wrong" in verdicts:
            return "wrong"
        return "refuses" if "refuses" in verdicts or self.unread(loadable) else "loads"

    def reads(self, layout: str) -> bool:
        """Whether it loads anything in a layout."""
        return any(row.verdict == "loads" and layout in row.when.layouts for row in self.rows)

    def loads(self, loadable: Loadable) -> bool:
        return self.verdict(loadable) == "loads"

    def why_not(self, loadable: Loadable) -> str:
        """Why it does not load, after the engine's name."""
        for verdict in ("wrong", "refuses"):
            for row, scheme in self.found(loadable):
                if row.verdict == verdict and row.note:
                    return filled(row.note, scheme)
        unread = [s.label for s in self.unread(loadable) if s]
        return f"{loadable.layout} is not read" + (f" with {unread[0]}" if unread else "")

    def line(self, loadable: Loadable, out: str) -> str:
        """The line that loads `out`."""
        rows = [row for row, _ in self.found(loadable)]
        needed = [*self.packages(loadable)]
        comment = f"  # {' + '.join([self.title, *needed])}" if needed else ""
        arguments = dict.fromkeys(row.argument for row in rows if row.argument)
        return (
            self.load.format(
                out=out,
                before="".join(dict.fromkeys(row.before for row in rows)),
                model_class=self.model_class(loadable),
                argument="".join(f", {argument}" for argument in arguments),
            )
            + comment
        )

    def snippet(self, loadable: Loadable, out: str) -> tuple[str, str]:
        """Language and code that loads `out` as it stands, what it needs in a comment."""
        code, _, comment = self.line(loadable, out).partition("  # ")
        if not self.module:
            return "bash", code
        *before, call = code.split("; ")
        names = sorted({node.id for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Name)})
        lines = [*([f"# needs {comment}"] if comment else []), *before]
        lines += [f"from {self.module} import {', '.join(names)}", "", f"model = {call}"]
        return "python", "\n".join(lines)

    def packages(self, loadable: Loadable) -> tuple[str, ...]:
        """What has to be installed beside the engine."""
        return tuple(dict.fromkeys(name for row, _ in self.found(loadable) for name in row.packages))

    def model_class(self, loadable: Loadable) -> str:
        """The class for the checkpoint's architecture, by the first of `classes` that fits."""
        name = loadable.architecture or "ForCausalLM"
        ending = (c for c in self.classes if name.endswith(c.ending))
        return next((c.name for c in ending if not c.families or loadable.family in c.families), "")


def filled(note: str, scheme: Scheme | None) -> str:
    """A row's note with the width of the scheme that it speaks of."""
    if scheme is None:
        return note
    return note.format(
        width=f"group size {scheme.group_size}" if scheme.group_size else f"per-{scheme.strategy} scales"
    )
