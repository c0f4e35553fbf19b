"""Which layout to write, and whether scales are symmetric: the table of `--format auto`.

| asked | written |
|---|---|
| int4 weight-only, group 32/64/128, dense model, every quantized out_features % 8 == 0 | awq, asymmetric by default |
| int4 otherwise (experts, channels, mixed schemes, widths, some families) | compressed-tensors, symmetric by default |
| int8 weight-only | compressed-tensors, symmetric by default |
| W8A8 | compressed-tensors (int-quantized), symmetric |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantconvert.errors import QuantConvertError, UnsupportedError, some
from quantconvert.families.parallel import part_of
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS, Layout
from quantconvert.layouts.awq import ENGINE_GROUPS
from quantconvert.planning.decision import Decision
from quantconvert.schemes import Request, Scheme

PACKED = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class Choice:
    """The settled layout, and why."""

    format: Layout
    reason: str

    def scheme(self, request: Request) -> Scheme:
        return request.settled(self.format.symmetric_by_default)


def choose_format(
    job: Job,
    decisions: Sequence[Decision],
    config: Mapping[str, Any],
    errors: list[QuantConvertError],
    awq_problem: str | None = None,
    transformers: bool = True,
) -> Choice:
    """Settle `--format auto`, and append to `errors` what the layout cannot hold. awq_problem and transformers:
    what the family's table says."""
    quantized = [d for d in decisions if d.request]
    requests = list(dict.fromkeys(d.request for d in quantized if d.request))
    if job.format != "auto":
        choice = Choice(LAYOUTS.find(job.format), "asked for by name")
    else:
        name, reason = _auto(requests, quantized, any(d.is_expert for d in decisions))
        if name == "awq" and not transformers:
            reason = "int4 packed along the output dimension"
        if name == "awq" and awq_problem:
            name, reason = PACKED, awq_problem
        choice = Choice(LAYOUTS.find(name), reason)
        if any(r.strategy == "tensor" and not r.activations for r in requests):
            errors.append(
                UnsupportedError(
                    "per-tensor weight-only scales load in no serving engine",
                    hint="--group-size -1 (per channel), or name the format: --format compressed-tensors",
                )
            )
    _check(choice, requests, quantized, errors)
    if job.tensor_parallel > 1:
        _check_ranks(choice, quantized, job.tensor_parallel, config, errors)
    return choice


def _auto(requests: Sequence[Request], quantized: Sequence[Decision], has_experts: bool) -> tuple[str, str]:
    if any(r.activations for r in requests):
        return PACKED, "the layout for quantized activations"
    if len(requests) > 1:
        return PACKED, "several schemes in one model, and AWQ holds one"
    for request in requests:
        if request.num_bits == 8:
            return PACKED, "the int8 weight-only layout that loads widely"
        if request.group_size not in ENGINE_GROUPS:
            width = f"group size {request.group_size}" if request.group_size else f"per-{request.strategy} scales"
            return PACKED, f"AWQ kernels read group sizes 32, 64 and 128, not {width}"
    if has_experts:
        return PACKED, "a mixture of experts: transformers 5 loads AWQ experts as random numbers"
    narrow = next((d for d in quantized if d.ref.shape[0] % 8), None)
    if narrow:
        return PACKED, f"AWQ needs out_features % 8 == 0, `{narrow.module}` has {narrow.ref.shape[0]}"
    return "awq", "int4 packed along the output dimension; vLLM, SGLang, transformers and GPTQModel all load it"


def _check(
    choice: Choice, requests: Sequence[Request], quantized: Sequence[Decision], errors: list[QuantConvertError]
) -> None:
    """Every weight must fit the layout; the same complaint about many weights is one refusal."""
    fmt = choice.format
    schemes = [choice.scheme(request) for request in requests]
    mixed = fmt.mix_problem(schemes) if len(schemes) > 1 else None
    if mixed:
        able = [f.name for f in LAYOUTS.values() if not f.mix_problem(schemes)]
        hint = f"--format {able[0]}" if able else None
        errors.append(UnsupportedError(f"{mixed}: {', '.join(s.label for s in schemes)}", hint=hint))
    found: dict[str, list[Decision]] = {}
    for decision in quantized:
        assert decision.request
        for problem in fmt.problems(choice.scheme(decision.request), decision.ref.shape, decision.module):
            found.setdefault(problem, []).append(decision)
    for problem, decisions in found.items():
        names = some([d.module for d in decisions])
        errors.append(UnsupportedError(f"{problem}: {names}", hint=_other_format(choice, decisions)))


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
        if part and d.request and not choice.format.problems(choice.scheme(d.request), d.ref.shape, d.module):
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
        if fmt is not choice.format and not any(
            fmt.problems(d.request.settled(fmt.symmetric_by_default), d.ref.shape, d.module)
            for d in decisions
            if d.request
        ):
            return f"--format {fmt.name}"
    return None
