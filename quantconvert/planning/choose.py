"""Which layout to write, and whether scales are symmetric.

`--format auto` is the first layout that can hold the schemes and that the engines load which `--engine` names. Where it
names none, awq is written unless an engine takes wrong numbers from it without a word, or could load
compressed-tensors, the only other one thought of.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantconvert.engines import ENGINES, Engine, Loadable, When, get_engines, titles
from quantconvert.errors import QuantConvertError, UnsupportedError, some
from quantconvert.families.parallel import part_of
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS, Layout
from quantconvert.patterns import template_of
from quantconvert.planning.decision import Decision, requests_of
from quantconvert.schemes import Request, Scheme

USUAL = ("awq", "compressed-tensors")
# What speaks for the last of them where the first cannot hold what was asked.
WORDS: tuple[tuple[When, str], ...] = (
    (When(type="float"), "the layout for float8"),
    (When(activations=True), "the layout for quantized activations"),
    (When(num_bits=8, several=False), "the int8 weight-only layout that loads widely"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The settled layout, and why; `loadable` is the result as engines meet it."""

    format: Layout
    reason: str
    loadable: Loadable

    def scheme(self, request: Request) -> Scheme:
        return request.settled(self.format.is_symmetric)


def choose_format(
    job: Job,
    decisions: Sequence[Decision],
    config: Mapping[str, Any],
    errors: list[QuantConvertError],
    model: Loadable,
) -> Choice:
    """Settle `--format auto`, and append to `errors` what the layout cannot hold.

    model: the checkpoint as engines meet it, but for layout and schemes.
    """
    quantized = [d for d in decisions if d.request]
    requests, kinds = requests_of(quantized), _kinds(quantized)
    if job.format != "auto":
        found = _Candidate.of(LAYOUTS.find(job.format), model, requests)
        choice = Choice(found.layout, "asked for by name", found.loadable)
    elif job.engines:
        choice = _first_loaded(job.engines, model, requests, kinds, errors)
    else:
        choice = _usual(model, requests, kinds, errors)
    _check(choice, quantized, kinds, errors)
    if job.tensor_parallel > 1:
        _check_ranks(choice, quantized, job.tensor_parallel, config, errors)
    return choice


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layout for the weights to quantize, and the result it would be."""

    layout: Layout
    loadable: Loadable

    @classmethod
    def of(cls, layout: Layout, model: Loadable, requests: Sequence[Request]) -> _Candidate:
        schemes = tuple(dict.fromkeys(request.settled(layout.is_symmetric) for request in requests))
        return cls(layout, replace(model, layout=layout.name, schemes=schemes))

    def unheld(self, kinds: Sequence[Sequence[Decision]]) -> str | None:
        """Why the layout cannot hold the weights, if so."""
        schemes = self.loadable.schemes
        mixed = self.layout.mix_problem(schemes) if len(schemes) > 1 else None
        if mixed:
            return mixed
        for alike in kinds:
            problems = _problems(self.layout, alike[0])
            if problems:
                return f"{problems[0]}: `{alike[0].module}`"
        return None

    def refused(self, engines: Sequence[Engine]) -> str | None:
        """Which of `engines` do not load the result, and why, if so."""
        said: dict[str, list[Engine]] = {}
        for engine in engines:
            if not engine.loads(self.loadable):
                said.setdefault(engine.why_not(self.loadable), []).append(engine)
        return "; ".join(f"{titles(who)}: {why}" for why, who in said.items()) or None

    def chosen(self, reason: str) -> Choice:
        return Choice(self.layout, reason, self.loadable)


def _usual(
    model: Loadable, requests: Sequence[Request], kinds: Sequence[Sequence[Decision]], errors: list[QuantConvertError]
) -> Choice:
    """The first of `USUAL`, unless an engine that reads the last one is better off with that."""
    first, last = (_Candidate.of(LAYOUTS.find(name), model, requests) for name in USUAL)
    engines = list(ENGINES.values())
    better = [
        engine
        for engine in engines
        if engine.verdict(first.loadable) == "wrong"
        or (engine.reads(last.layout.name) and engine.verdict(last.loadable) != "wrong")
    ]
    against = first.unheld(kinds) or first.refused(better)
    if not against:
        what = first.layout.summary.partition(" (")[0]
        return first.chosen(f"{what}; {titles([e for e in engines if e.loads(first.loadable)])} all load it")
    errors += _unserved(last.loadable)
    words = (text for when, text in WORDS for s in last.loadable.schemes if when.matches(last.loadable, s))
    return last.chosen(next(words, None) or against or last.layout.summary)


def _unserved(loadable: Loadable) -> list[QuantConvertError]:
    """Schemes that no engine serves in any model."""
    serving = [engine for engine in ENGINES.values() if engine.serves]
    unserved = [
        scheme.strategy
        for scheme in loadable.schemes
        if not any(engine.loads(Loadable(loadable.layout, (scheme,))) for engine in serving)
    ]
    return [
        UnsupportedError(
            f"per-{strategy} weight-only scales load in no serving engine",
            hint="--group-size -1 (per channel), or name the format: --format compressed-tensors",
        )
        for strategy in dict.fromkeys(unserved)
    ]


def _first_loaded(
    names: Sequence[str],
    model: Loadable,
    requests: Sequence[Request],
    kinds: Sequence[Sequence[Decision]],
    errors: list[QuantConvertError],
) -> Choice:
    """The first of all layouts that the engines asked for load; a refusal that says why of each where none is."""
    engines = get_engines(names)
    candidates = [_Candidate.of(layout, model, requests) for layout in LAYOUTS.values()]
    against = {}
    for candidate in candidates:
        why = candidate.unheld(kinds) or candidate.refused(engines)
        if why is None:
            verb = "loads" if len(engines) == 1 else "all load"
            return candidate.chosen(f"the first layout that {titles(engines)} {verb}")
        against[candidate.layout.name] = why
    if requests:
        lines = "".join(f"\n  {name}: {why}" for name, why in against.items())
        errors.append(
            UnsupportedError(
                f"no layout of these weights loads in {titles(engines)}:{lines}",
                hint="another scheme (--scheme W4A16:g128 loads most widely), other engines, or name the --format",
            )
        )
    return candidates[0].chosen("")


def _check(
    choice: Choice, quantized: Sequence[Decision], kinds: Sequence[Sequence[Decision]], errors: list[QuantConvertError]
) -> None:
    """Every weight must fit the layout; the same complaint about many weights is one refusal."""
    fmt = choice.format
    schemes = choice.loadable.schemes
    mixed = fmt.mix_problem(schemes) if len(schemes) > 1 else None
    if mixed:
        able = [f.name for f in LAYOUTS.values() if not f.mix_problem(schemes)]
        hint = f"--format {able[0]}" if able else None
        errors.append(UnsupportedError(f"{mixed}: {', '.join(s.label for s in schemes)}", hint=hint))
    found: dict[str, list[Decision]] = {}
    for alike in kinds:
        for problem in _problems(fmt, alike[0]):
            found.setdefault(problem, []).extend(alike)
    places = {d.ref.name: i for i, d in enumerate(quantized)} if found else {}
    for problem, decisions in found.items():
        decisions.sort(key=lambda d: places[d.ref.name])
        names = some([d.module for d in decisions])
        errors.append(UnsupportedError(f"{problem}: {names}", hint=_other_format(choice, decisions)))


def _kinds(quantized: Iterable[Decision]) -> list[list[Decision]]:
    """Those together that a layout holds alike: numbers in names tell nothing."""
    found: dict[Hashable, list[Decision]] = {}
    for d in quantized:
        found.setdefault((id(d.request), d.ref.shape, template_of(d.ref.name)), []).append(d)
    return list(found.values())


def _problems(layout: Layout, decision: Decision) -> list[str]:
    """Why a layout cannot hold a weight that is quantized."""
    assert decision.request
    scheme = decision.request.settled(layout.is_symmetric)
    if scheme.type not in layout.kinds:
        return [f"{layout.name} holds no {scheme.label}"]
    return layout.problems(scheme, decision.ref.shape, decision.module)


def _check_ranks(
    choice: Choice,
    quantized: Sequence[Decision],
    ranks: int,
    config: Mapping[str, Any],
    errors: list[QuantConvertError],
) -> None:
    """What each rank holds must fit the layout too: words are not split between ranks."""
    found: dict[str, list[Decision]] = {}
    for d in quantized:
        part = part_of(d.module, d.ref.shape, 0, ranks, config)
        if part and d.request and not _problems(choice.format, d):
            for problem in choice.format.rank_problems(choice.scheme(d.request), part.shape, d.module):
                found.setdefault(problem, []).append(d)
    for problem, decisions in found.items():
        errors.append(
            UnsupportedError(
                f"on each of {ranks} ranks: {problem}: {some([d.module for d in decisions])}",
                hint="--format compressed-tensors --symmetric, fewer ranks, or --rule 'PATTERN=skip' for these layers",
            )
        )


def _other_format(choice: Choice, decisions: Sequence[Decision]) -> str | None:
    """A format that holds all of `decisions`, as the flag to try."""
    for fmt in LAYOUTS.values():
        if fmt is not choice.format and not any(_problems(fmt, alike[0]) for alike in _kinds(decisions)):
            return f"--format {fmt.name}"
    return None
