"""Whether the method asked for can do its work: what it must be told, and the schemes that it has codes for."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.engines import get_engines, titles
from quantconvert.errors import QuantConvertError, UnsupportedError, UsageError, some
from quantconvert.methods import DEFAULT_METHOD, Method
from quantconvert.planning.choose import Choice
from quantconvert.planning.decision import Decision
from quantconvert.schemes import Scheme


def lacking_moments(method: Method) -> UsageError:
    """The refusal of a method that needs what only statistics tell."""
    return UsageError(
        f"--method {method.name}: expected a source of the second moments of the inputs of each layer, got none",
        hint="quantconvert observe SRC STATS --self --moments, then --statistics STATS; "
        f"--method {DEFAULT_METHOD} needs nothing but the weights",
    )


def check_schemes(
    method: Method,
    choice: Choice,
    decisions: Sequence[Decision],
    engines: Sequence[str],
    errors: list[QuantConvertError],
) -> None:
    """Refuse the schemes that the method has no codes for, with the modules that have them.

    engines: those that have to load the result; scales of either sign are not for each of them.
    """
    modules: dict[str, list[str]] = {}
    requests = {id(d.request): d.request for d in decisions if d.request}
    schemes = {key: choice.scheme(request) for key, request in requests.items()}
    without = {key: (scheme, problem) for key, scheme in schemes.items() if (problem := method.supports(scheme))}
    for decision in decisions if without else ():
        if id(decision.request) in without:
            scheme, problem = without[id(decision.request)]
            modules.setdefault(f"no codes for {scheme.label} ({problem})", []).append(decision.module)
    _check_signs(method, choice, list(schemes.values()), engines, errors)
    for problem, names in modules.items():
        errors.append(
            UnsupportedError(
                f"--method {method.name} has {problem}: {some(names)}",
                hint=f"another --group-size, or --method {DEFAULT_METHOD}",
            )
        )


def _check_signs(
    method: Method, choice: Choice, schemes: Sequence[Scheme], engines: Sequence[str], errors: list[QuantConvertError]
) -> None:
    """A method whose scales may be negative is for engines whose kernels multiply by what they find."""
    layout = choice.format.name
    if not any(method.tolerance(scheme, "BF16", "BF16").negative for scheme in schemes):
        return
    unable = [engine for engine in get_engines(engines) if layout not in engine.signed]
    if unable and (engines or len(unable) == len(get_engines(()))):
        errors.append(
            UnsupportedError(
                f"--method {method.name} writes scales of either sign, which in {layout} is not known to be read by "
                f"{titles(unable)}",
                hint="--format compressed-tensors or gptq, or --method rtn",
            )
        )
