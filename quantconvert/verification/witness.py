"""Each task's result against its source while both are at hand: where the source goes before the end comes.

What engines would make of the tensors that a task wrote is found as ever, from their names, shapes and the config that
the result will have; only that they still lie in a partial file, and are looked at one weight at a time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial

from quantconvert.checkpoint import Repo, TensorRef
from quantconvert.checkpoint.header import parse_header
from quantconvert.checkpoint.ranges import Files, LocalReader, RangeReader, Version
from quantconvert.errors import QuantConvertError
from quantconvert.events import silent
from quantconvert.kernels.native.choice import chosen
from quantconvert.lazy import load_torch
from quantconvert.planning import Plan, Task
from quantconvert.run.shards import ShardWriter
from quantconvert.sources import Read, as_stored, find_sources
from quantconvert.verification.findings import TensorError, Verification
from quantconvert.verification.pairs import Meter, Pace, Pair, Values, kept, refused
from quantconvert.verification.quick import Quick


class Witness:
    """What a conversion's tasks have written, checked by those who wrote it."""

    def __init__(self, plan: Plan, source: Repo) -> None:
        self.plan, self.source, self.found = plan, source, Values()
        self.method = plan.job.method if plan.job.operation == "convert" else None
        self._kernel, self._lock = chosen(), threading.Lock()
        self._refs: dict[int, dict[str, TensorRef]] = {}

    def see(self, index: int, theirs: Files, writer: ShardWriter) -> bool:
        """Check what the task has written; whether it is right."""
        task, values = self.plan.tasks[index], Values()
        with closing(Files(_Written(self.plan, writer))) as ours:
            for tensor in self._tensors(task, ours, values):
                origin = task.source if tensor.stored is not None else kept(task.source)
                pair = Pair(tensor, origin, Meter(tensor, Pace(silent)))
                found = refused(pair, partial(self._check, ours=ours, theirs=theirs))
                assert found is not None
                values.add_all(found)
        with self._lock:
            self.found.add_all(values)
        return not values.findings

    def _check(self, pair: Pair, ours: Files, theirs: Files) -> Values:
        execution = self.plan.execution
        found = Quick(ours, theirs, execution, self.method, self._kernel).check(pair)
        if found is not None:
            return found
        load_torch()
        sys.modules["torch"].set_num_threads(1)
        from quantconvert.verification.reference import Reference

        return Reference(ours, theirs, execution, self.method).check(pair)

    def _tensors(self, task: Task, ours: Files, values: Values) -> tuple[Read, ...]:
        """The tensors as engines find them; what stands against that is a finding."""
        headers = self._headers(task.outputs[0].shard)
        refs = tuple(headers[output.name] for output in task.outputs)
        if task.scheme is None:
            return tuple(map(as_stored, refs))
        alone = replace(
            self.plan.checkpoint, config=dict(self.plan.config), tensors=refs, weight_files=(), side_files=()
        )
        errors: list[QuantConvertError] = []

        def read(ref: TensorRef) -> bytes:
            data = bytearray(ref.nbytes)
            ours.read_into(ref.file, memoryview(data), ref.offset)
            return bytes(data)

        reads = find_sources(alone, None, read, errors, codes_first=True).reads
        for error in errors:
            values.add("structure", task.source.module, error.message)
        return () if errors else reads

    def _headers(self, shard: int) -> Mapping[str, TensorRef]:
        with self._lock:
            if shard not in self._refs:
                planned = self.plan.shards[shard]
                refs = parse_header(planned.header[8:], planned.file, planned.nbytes)
                self._refs[shard] = {ref.name: ref for ref in refs}
            return self._refs[shard]

    def outcome(self, earlier: Mapping[str, TensorError]) -> Verification:
        """All of it as one. earlier: weights that a run before this one has seen."""
        here = {error.name for error in self.found.errors}
        errors = [*self.found.errors, *(error for name, error in earlier.items() if name not in here)]
        return Verification(
            location=self.plan.checkpoint.location,
            source=self.source.location,
            num_files=len(self.plan.shards),
            num_tensors=sum(len(task.outputs) for task in self.plan.tasks),
            num_checksums=0,
            num_equal=self.found.num_equal,
            errors=tuple(sorted(errors, key=lambda error: error.name)),
            findings=tuple(self.found.findings),
            method=self.method,
        )


class _Written:
    """The shards of a plan as far as they are written; the writer closes what it has opened."""

    def __init__(self, plan: Plan, writer: ShardWriter) -> None:
        self._writer = writer
        self._numbers = {shard.file: number for number, shard in enumerate(plan.shards)}
        self._plan = plan

    def open(self, path: str) -> RangeReader:
        number = self._numbers[path]
        return _Borrowed(self._writer.fd(number), path, self._plan.shards[number].nbytes)


class _Borrowed(LocalReader):
    """A file that somebody else has open."""

    def __init__(self, fd: int, name: str, nbytes: int) -> None:
        self.name, self._fd, self._nbytes = name, fd, nbytes

    def version(self) -> Version:
        return Version(self._nbytes)

    def close(self) -> None:
        self._fd = -1
