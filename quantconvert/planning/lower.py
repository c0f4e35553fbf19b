"""From decisions to tasks: what each promises, and how it is cut."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from quantconvert.kernels import scratch
from quantconvert.layouts import Layout, TensorSpec
from quantconvert.methods import Method
from quantconvert.planning.decision import Decision
from quantconvert.planning.knowledge import Knowledge
from quantconvert.planning.known import method_for
from quantconvert.planning.memory import cut
from quantconvert.planning.place import Unit, unchanged
from quantconvert.planning.plan import Execution
from quantconvert.planning.tasks import UNKNOWN, Copy, Cut, Decode, Known, Output, Quantize, Repack, Split, Task
from quantconvert.schemes import Scheme
from quantconvert.sources import Read, form_of

_NOTHING: Mapping[str, float] = MappingProxyType({})
_KNOWN_NOTHING = Knowledge()
_ALONE: Mapping[str, tuple[Read, ...]] = MappingProxyType({})


class Lowering:
    """How decisions become tasks: in which layout (None: plain numbers), by which method, for which execution.

    maxima: max |x| of the inputs of modules whose activations get a stored scale. knowledge: of inputs, for the method.
    siblings: by name, the weights that share with a weight what divides their scales.
    """

    def __init__(
        self,
        layout: Layout | None,
        method: Method,
        execution: Execution,
        maxima: Mapping[str, float] = _NOTHING,
        knowledge: Knowledge = _KNOWN_NOTHING,
        siblings: Mapping[str, tuple[Read, ...]] = _ALONE,
    ) -> None:
        self.siblings = siblings
        self.layout, self.method, self.execution = layout, method, execution
        self.maxima, self.knowledge = maxima, knowledge
        # The experts of a model are alike, and so are its layers: what they share is found once. Requests are known by
        # their `id`, as each outlives this and is asked for so often.
        self._promises: dict[Hashable, _Promise] = {}
        self._schemes: dict[Scheme, Scheme] = {}  # equal ones are one object
        self._hows: dict[Hashable, _How] = {}
        self._without = method_for(method, UNKNOWN)
        self._cuts: dict[Hashable, Cut] = {}

    def scheme(self, decision: Decision) -> Scheme | None:
        """The scheme of the codes that a decision leads to, equal ones as one object; None where it leads to none."""
        if decision.request is None or self.layout is None:
            return decision.scheme and self._schemes.setdefault(decision.scheme, decision.scheme)
        return self._promise(decision).scheme

    def unit(self, decision: Decision) -> Unit:
        """The module and what is promised for it."""
        ref = decision.ref
        if decision.scheme is not None or (decision.request is not None and self.layout is not None):
            return ref.module, self._promise(decision).specs
        if decision.dtype is not None:
            return ref.name, (TensorSpec("", decision.dtype, ref.shape),)
        return unchanged(ref)

    def _promise(self, decision: Decision) -> _Promise:
        """What the layout promises for all weights of one shape and dtype under one scheme."""
        ref, request = decision.ref, decision.request
        stored = ref.stored
        shape = ref.shape if stored is None else stored.shape
        key = id(request), decision.scheme, shape, ref.dtype
        found = self._promises.get(key)
        if found is None:
            assert self.layout is not None
            scheme = request.settled(self.layout.is_symmetric) if request else decision.scheme
            assert scheme is not None
            scheme = self._schemes.setdefault(scheme, scheme)
            specs = self.layout.outputs(shape, ref.dtype, scheme)
            turned = sum(spec.nbytes for spec in specs if spec.transposed)
            found = self._promises[key] = _Promise(scheme, specs, turned, self.layout.row_multiple(scheme))
        return found

    def _cut(self, ref: Read, promise: _Promise | None = None, method: Method | None = None, told: int = 0) -> Cut:
        """How a tensor is cut, for a method where it is quantized. told: bytes of what that is told of inputs."""
        key = form_of(ref), promise and id(promise), method and method.name, told
        return self._cuts.get(key) or self._cuts.setdefault(key, self._new_cut(ref, promise, method, told))

    def _new_cut(self, ref: Read, promise: _Promise | None, method: Method | None, told: int) -> Cut:
        turned, multiple = (promise.turned_nbytes, promise.row_multiple) if promise else (0, 1)
        if promise is None or method is None:
            return cut(ref, ref.matrix, turned, multiple, self.execution)
        held = method.held(promise.scheme, ref.matrix[1]) + (told if method.needs != "nothing" else 0)
        taken = scratch(method, promise.scheme)
        return cut(ref, ref.matrix, turned, multiple, self.execution, taken, held, method.block_rows)

    def _how(self, decision: Decision, known: Known) -> _How:
        """What of a task holds for all weights of one form under one request, of which as much is known."""
        told = 8 * sum(place.num_elements for place in known if place) if known is not UNKNOWN else 0
        method = self._without if known is UNKNOWN else method_for(self.method, known)
        key = form_of(decision.ref), id(decision.request), method.name, told
        found = self._hows.get(key)
        if found is None:
            assert self.layout is not None
            promise = self._promise(decision)
            parts = self._cut(decision.ref, promise, method, told)
            found = self._hows[key] = _How(promise.scheme, method.name, self.layout.name, parts)
        return found

    def task(self, decision: Decision, outputs: tuple[Output, ...]) -> Task:
        """The task of a decision whose outputs have their places."""
        ref = decision.ref
        if decision.scheme is not None or (decision.request is not None and self.layout is not None):
            assert self.layout is not None
            if decision.scheme is not None:
                promise = self._promise(decision)
                return Repack(
                    ref, outputs, decision.evidence, promise.scheme, self.layout.name, self._cut(ref, promise)
                )
            known = self.knowledge.of(decision.module) if self.knowledge.modules else UNKNOWN
            largest = self.maxima.get(decision.module) if self.maxima else None
            how = self._how(decision, known)
            return Quantize(ref, outputs, decision.evidence, *how, largest, known, self.siblings.get(ref.name, ()))
        if decision.reason is None or decision.is_decoded or ref.steps:
            return Decode(ref, outputs, decision.evidence, decision.reason, self._cut(ref))
        if ref.is_stored:
            return Copy(ref, outputs, decision.evidence, decision.reason)
        return Split(ref, outputs, decision.evidence, decision.reason)


class _Promise(NamedTuple):
    """What holds for all weights of one shape: turned_nbytes are of outputs that are stored transposed."""

    scheme: Scheme
    specs: tuple[TensorSpec, ...]
    turned_nbytes: int
    row_multiple: int


class _How(NamedTuple):
    """How weights of one form are quantized."""

    scheme: Scheme
    method: str
    layout: str
    cut: Cut
