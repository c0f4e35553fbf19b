"""Which layout to write, and whether scales are symmetric: the table of `--format auto`.

| asked | written |
|---|---|
| int4 weight-only, group 32/64/128, dense model, every quantized out_features % 8 == 0 | awq, asymmetric by default |
| int4 otherwise (experts, per channel, mixed schemes, other widths) | compressed-tensors, symmetric by default |
| int8 weight-only | compressed-tensors, symmetric by default |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantconvert.errors import QuantConvertError, UnsupportedError
from quantconvert.formats import Format, get_format
from quantconvert.formats.awq import ENGINE_GROUPS
from quantconvert.job import Job, Scheme
from quantconvert.planning.decide import Decision, scheme_of


@dataclass(frozen=True, slots=True)
class Choice:
    """The settled layout and base scheme, and why."""

    format: Format
    scheme: Scheme
    reason: str


def choose_format(job: Job, quantized: Sequence[Decision], errors: list[QuantConvertError]) -> Choice:
    """Settle `--format auto` and the symmetry, and append to `errors` what the layout cannot hold."""
    if job.format != "auto":
        fmt, reason = get_format(job.format), "asked for by name"
    else:
        name, reason = _auto(job, quantized)
        fmt = get_format(name)
        if job.group_size == 0:
            errors.append(
                UnsupportedError(
                    "per-tensor weight-only scales load in no serving engine",
                    hint="--group-size -1 (per channel), or name the format: --format compressed-tensors",
                )
            )
    symmetric = fmt.symmetric_by_default if job.symmetric is None else job.symmetric
    choice = Choice(fmt, job.scheme(symmetric), reason)
    _check(choice, quantized, errors)
    return choice


def _auto(job: Job, quantized: Sequence[Decision]) -> tuple[str, str]:
    packed = "compressed-tensors"
    if job.num_bits == 8:
        return packed, "the int8 weight-only layout that loads widely"
    if job.group_size not in ENGINE_GROUPS:
        width = {-1: "per-channel scales", 0: "per-tensor scales"}.get(job.group_size, f"group size {job.group_size}")
        return packed, f"AWQ kernels read group sizes 32, 64 and 128, not {width}"
    if any(d.is_expert for d in quantized):
        return packed, "a mixture of experts: transformers 5 loads AWQ experts as random numbers"
    if any(d.strategy_override for d in quantized):
        return packed, "some layers are per channel (--on-indivisible channel), and AWQ holds one scheme"
    narrow = next((d for d in quantized if d.ref.shape[0] % 8), None)
    if narrow:
        return packed, f"AWQ needs out_features % 8 == 0, `{narrow.module}` has {narrow.ref.shape[0]}"
    return "awq", "int4 packed along the output dimension; vLLM, SGLang, transformers and GPTQModel all load it"


def _check(choice: Choice, quantized: Sequence[Decision], errors: list[QuantConvertError]) -> None:
    """Every weight must fit the layout; the same complaint about many weights is one refusal."""
    found: dict[str, list[str]] = {}
    for decision in quantized:
        if decision.strategy_override and not choice.format.mixed_schemes:
            problem = f"{choice.format.name} holds one scheme for the whole model, got a per-channel layer too"
            found.setdefault(problem, []).append(decision.module)
        for problem in choice.format.problems(scheme_of(decision, choice.scheme), decision.ref.shape):
            found.setdefault(problem, []).append(decision.module)
    for problem, modules in found.items():
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        names = ", ".join(f"`{name}`" for name in modules[:3])
        errors.append(UnsupportedError(f"{problem}: {names}{more}", hint="--format compressed-tensors"))
