"""From decisions to tasks: what each promises, and how it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from quantconvert.kernels import scratch
from quantconvert.layouts import Layout, TensorSpec
from quantconvert.methods import Method
from quantconvert.planning.decision import Decision
from quantconvert.planning.knowledge import Knowledge
from quantconvert.planning.known import method_for
from quantconvert.planning.memory import cut
from quantconvert.planning.place import Unit, unchanged
from quantconvert.planning.plan import Execution
from quantconvert.planning.tasks import Copy, Cut, Decode, Known, Output, Quantize, Repack, Split, Task
from quantconvert.schemes import Scheme
from quantconvert.sources import Read

_NOTHING: Mapping[str, float] = MappingProxyType({})
_KNOWN_NOTHING = Knowledge()


class Lowering:
    """How decisions become tasks: in which layout (None: plain numbers), by which method, for which execution.

    maxima: max |x| of the inputs of modules whose activations get a stored scale. knowledge: of inputs, for the method.
    """

    def __init__(
        self,
        layout: Layout | None,
        method: Method,
        execution: Execution,
        maxima: Mapping[str, float] = _NOTHING,
        knowledge: Knowledge = _KNOWN_NOTHING,
    ) -> None:
        self.layout, self.method, self.execution = layout, method, execution
        self.maxima, self.knowledge = maxima, knowledge
        self._specs = lru_cache(maxsize=4096)(layout.outputs) if layout else None  # the experts of a model are alike

    def scheme(self, decision: Decision) -> Scheme | None:
        """The scheme of the codes that a decision leads to; None where it leads to none."""
        if decision.request is None or self.layout is None:
            return decision.scheme
        return decision.request.settled(self.layout.symmetric_by_default)

    def unit(self, decision: Decision) -> Unit:
        """The module and what is promised for it."""
        ref, scheme = decision.ref, self.scheme(decision)
        if scheme is not None:
            assert self._specs is not None
            shape = ref.shape if ref.stored is None else ref.stored.shape
            return decision.module, self._specs(shape, ref.dtype, scheme)
        if decision.dtype is not None:
            return ref.name, (TensorSpec("", decision.dtype, ref.shape),)
        return unchanged(ref)

    def _cut(self, ref: Read, scheme: Scheme, method: Method, known: Known, turned_nbytes: int, multiple: int) -> Cut:
        """How a weight is cut for the method."""
        told = 8 * sum(place.num_elements for place in known if place) if method.needs != "nothing" else 0
        held = method.held(scheme, ref.matrix[1]) + told
        taken = scratch(method, scheme)
        return cut(ref, ref.matrix, turned_nbytes, multiple, self.execution, taken, held, method.block_rows)

    def task(self, decision: Decision, outputs: tuple[Output, ...]) -> Task:
        """The task of a decision whose outputs have their places."""
        ref, scheme = decision.ref, self.scheme(decision)
        if scheme is not None:
            assert self.layout is not None
            turned = sum(output.nbytes for output in outputs if output.spec.transposed)
            multiple = self.layout.row_multiple(scheme)
            if decision.scheme is not None:
                parts = cut(ref, ref.matrix, turned, multiple, self.execution)
                return Repack(ref, outputs, decision.evidence, scheme, self.layout.name, parts)
            known, largest = self.knowledge.of(decision.module), self.maxima.get(decision.module)
            method = method_for(self.method, known)
            parts, name = self._cut(ref, scheme, method, known, turned, multiple), self.layout.name
            return Quantize(ref, outputs, decision.evidence, scheme, method.name, name, parts, largest, known)
        if decision.reason is None or decision.is_decoded or ref.steps:
            parts = cut(ref, ref.matrix, 0, 1, self.execution)
            return Decode(ref, outputs, decision.evidence, decision.reason, parts)
        if ref.is_stored:
            return Copy(ref, outputs, decision.evidence, decision.reason)
        return Split(ref, outputs, decision.evidence, decision.reason)
