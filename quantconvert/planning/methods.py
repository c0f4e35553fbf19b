"""Whether the method asked for can do its work: what it must be told, and the schemes that it has codes for."""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.errors import QuantConvertError, UnsupportedError, UsageError, some
from quantconvert.methods import DEFAULT_METHOD, Method
from quantconvert.planning.choose import Choice
from quantconvert.planning.decision import Decision


def lacking_moments(method: Method) -> UsageError:
    """The refusal of a method that needs what only statistics tell."""
    return UsageError(
        f"--method {method.name}: expected a source of the second moments of the inputs of each layer, got none",
        hint="quantconvert observe SRC STATS --self --moments, then --statistics STATS; "
        f"--method {DEFAULT_METHOD} needs nothing but the weights",
    )


def check_schemes(
    method: Method, choice: Choice, decisions: Sequence[Decision], errors: list[QuantConvertError]
) -> None:
    """Refuse the schemes that the method has no codes for, with the modules that have them."""
    modules: dict[str, list[str]] = {}
    requests = {id(d.request): d.request for d in decisions if d.request}
    schemes = {key: choice.scheme(request) for key, request in requests.items()}
    without = {key: (scheme, problem) for key, scheme in schemes.items() if (problem := method.supports(scheme))}
    for decision in decisions if without else ():
        if id(decision.request) in without:
            scheme, problem = without[id(decision.request)]
            modules.setdefault(f"no codes for {scheme.label} ({problem})", []).append(decision.module)
    for problem, names in modules.items():
        errors.append(
            UnsupportedError(
                f"--method {method.name} has {problem}: {some(names)}",
                hint=f"another --group-size, or --method {DEFAULT_METHOD}",
            )
        )
