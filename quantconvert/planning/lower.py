"""From decisions to tasks: what each promises, and how it is cut."""

from __future__ import annotations

from functools import lru_cache

from quantconvert.kernels import scratch
from quantconvert.layouts import Layout, TensorSpec
from quantconvert.methods import Method
from quantconvert.planning.decision import Decision
from quantconvert.planning.memory import cut
from quantconvert.planning.place import Unit, unchanged
from quantconvert.planning.plan import Execution
from quantconvert.planning.tasks import Copy, Decode, Output, Quantize, Repack, Split, Task
from quantconvert.schemes import Scheme


class Lowering:
    """How decisions become tasks: in which layout (None: plain numbers), by which method, for which execution."""

    def __init__(self, layout: Layout | None, method: Method, execution: Execution) -> None:
        self.layout, self.method, self.execution = layout, method, execution
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
            held = self.method.held(scheme, ref.matrix[1])
            parts = cut(ref, ref.matrix, turned, multiple, self.execution, scratch(self.method, scheme), held)
            return Quantize(ref, outputs, decision.evidence, scheme, self.method.name, self.layout.name, parts)
        if decision.reason is None or decision.is_decoded or ref.steps:
            parts = cut(ref, ref.matrix, 0, 1, self.execution)
            return Decode(ref, outputs, decision.evidence, decision.reason, parts)
        if ref.is_stored:
            return Copy(ref, outputs, decision.evidence, decision.reason)
        return Split(ref, outputs, decision.evidence, decision.reason)
