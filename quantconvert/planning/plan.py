"""A conversion, decided: values only."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.checkpoint.contents import QUANTIZATION_KEYS
from quantconvert.checkpoint.files import INDEX_NAME
from quantconvert.digest import digest
from quantconvert.engines import Loadable
from quantconvert.factors import Factors
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS
from quantconvert.planning.knowledge import Knowledge
from quantconvert.planning.spent import Budget
from quantconvert.planning.tasks import Operation, Task, role_of
from quantconvert.schemes import Scheme
from quantconvert.sources import Dropped, scratch_nbytes
from quantconvert.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, whole size, and the bytes before the first tensor."""

    file: str
    nbytes: int
    header: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Execution:
    """How many workers, and how many output bytes each buffers; derived from the limits, never changes bytes."""

    workers: int
    slab_nbytes: int
    memory_limit: int


@dataclass(frozen=True)  # without slots, so that totals are counted once
class Plan:
    """Everything about a conversion that is known before one weight is read.

    `tasks` account for every source tensor exactly once, in the order of the source's bytes. `changes`: keys of
    config.json that have other values in the result. `nonfinite`: what was found in weights before planning.
    """

    job: Job
    checkpoint: Checkpoint
    family: str | None
    format: str
    format_reason: str
    tasks: tuple[Task, ...] = field(repr=False)
    shards: tuple[Shard, ...]
    source_format: str | None
    quantization_config: Mapping[str, Any] | None = field(repr=False)
    notes: tuple[str, ...]
    execution: Execution
    plain_dtype: str | None = None
    dropped: tuple[Dropped, ...] = ()
    loadable: Loadable = field(default_factory=Loadable)
    changes: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    factors: Factors | None = field(default=None, repr=False)
    knowledge: Knowledge | None = field(default=None, repr=False)
    statistics: Statistics | None = None
    nonfinite: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def quantized(self) -> tuple[Task, ...]:
        """Tasks that do what was asked: quantize, repack or dequantize a weight."""
        return tuple(task for task in self.tasks if task.reason is None)

    @cached_property
    def kept(self) -> tuple[Task, ...]:
        """Tasks whose tensor stays in high precision; what was quantized in the source is decoded for it."""
        return tuple(task for task in self.tasks if task.reason is not None)

    @cached_property
    def total_size(self) -> int:
        """Bytes of all output tensors: the index's `total_size`."""
        return sum(shard.nbytes - len(shard.header) for shard in self.shards)

    @cached_property
    def by_shard(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of tasks, by the shard that they write into."""
        found: list[list[int]] = [[] for _ in self.shards]
        for index, task in enumerate(self.tasks):
            found[task.outputs[0].shard].append(index)
        return tuple(map(tuple, found))

    @property
    def output_nbytes(self) -> int:
        """Bytes that the result takes on disk: shards and side files (index, config and card come on top)."""
        side = sum(file.nbytes for file in self.checkpoint.side_files)
        return sum(shard.nbytes for shard in self.shards) + side + (self.factors.file.nbytes if self.factors else 0)

    @property
    def read_nbytes(self) -> int:
        """Bytes that a run reads: those of steps that look at a weight before they change it as often as they do."""
        sources = [task.source for task in self.tasks]
        steps = sum([source.nbytes * (1 + sum([step.passes for step in source.steps])) for source in sources])
        walk = self.knowledge.walk if self.knowledge else None
        return steps + (self.factors.read_nbytes if self.factors else 0) + (walk.read_nbytes if walk else 0)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name to file, sorted by name."""
        pairs = [(output.name, self.shards[output.shard].file) for task in self.tasks for output in task.outputs]
        return dict(sorted(pairs))

    @cached_property
    def accounts(self) -> dict[str, int]:
        """How many stored tensors went where; together they are all of the checkpoint's, each in one place.

        `decoded`: quantized in the source, kept in high precision here. `changed`: kept, but
        by steps not as it was. `partners`: scales and the like, read with
        the tensor that holds the values.
        """
        found: dict[str, str] = {}
        for task in self.tasks:
            source = task.source
            is_changed = source.num_bits is None and source.steps and task.reason is not None
            word = "changed" if is_changed else _ACCOUNTS[task.operation]
            for ref in source.refs.values():
                found[ref.name], word = word, "partners"
        found |= {dropped.ref.name: "dropped" for dropped in self.dropped}
        return dict(Counter(found.values()))

    @cached_property
    def bits_per_weight(self) -> float:
        """Output bits for each source element, everything counted."""
        return 8 * self.total_size / max(1, _num_elements(self.tasks))

    @cached_property
    def bits_per_quantized_weight(self) -> float:
        """Output bits, scales and zero points included, for each weight of a quantized layer."""
        nbytes = sum([output.spec.nbytes for task in self.quantized for output in task.outputs])
        return 8 * nbytes / max(1, _num_elements(self.quantized))

    @cached_property
    def peak_nbytes(self) -> int:
        """The most memory that tasks, or a bag of tokens, hold at once, on top of the interpreter with torch."""
        largest = sorted([task.peak_nbytes for task in self.tasks], reverse=True)
        walk = self.knowledge.walk if self.knowledge else None
        before = 0
        if walk:
            from quantconvert.factors.room import bag_nbytes

            before = bag_nbytes(walk, self.execution)
        return max(before, min(sum(largest[: self.execution.workers]), self.execution.memory_limit))

    @cached_property
    def scratch_nbytes(self) -> int:
        """The most bytes of scratch files at once, on the disk that the result is written to."""
        slab = self.execution.slab_nbytes
        largest = sorted((scratch_nbytes(task.source, slab) for task in self.tasks), reverse=True)
        return sum(largest[: self.execution.workers])

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of most weights; None where the result is not quantized."""
        return None if not self.schemes else max(self.schemes.items(), key=lambda item: item[1])[0]

    @cached_property
    def schemes(self) -> dict[Scheme, int]:
        """How many weights each scheme has."""
        schemes = {id(task.scheme): task.scheme for task in self.quantized if task.scheme}
        counts: Counter[Scheme] = Counter()
        for key, count in Counter([id(task.scheme) for task in self.quantized if task.scheme]).items():
            counts[schemes[key]] += count
        return dict(counts)

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of model.safetensors.index.json; None when one file holds everything."""
        if len(self.shards) == 1:
            return None
        return {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}

    @property
    def config(self) -> dict[str, Any]:
        """The content of the result's config.json."""
        config = _without_blocks(self.checkpoint.config) | dict(self.changes)
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = _without_blocks(config["text_config"]) | dict(self.changes)
        if self.plain_dtype:
            config |= {key: self.plain_dtype for key in ("dtype", "torch_dtype") if key in config}
        if self.quantization_config is not None:
            config["quantization_config"] = dict(self.quantization_config)
            config |= LAYOUTS[self.format].beside(self.quantization_config)
        return config

    @cached_property
    def source_digest(self) -> str:
        """sha256 over the names, dtypes, shapes and places of the source's tensors, and how each is read."""
        return digest([task.source for task in self.tasks])

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the output's bytes, the source's layout included."""
        headers = [hashlib.sha256(shard.header).hexdigest() for shard in self.shards]
        known = [self.statistics.digest] if self.statistics else []
        return digest([self.job.to_json(), self.source_digest, headers, self.config, *known])

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values: totals first, then one entry a source tensor."""
        return {
            "source": self.checkpoint.location,
            "revision": self.checkpoint.revision,
            "model_type": self.checkpoint.model_type,
            "family": self.family,
            "format": self.format,
            "format_reason": self.format_reason,
            "scheme": self.scheme.label if self.scheme else None,
            "num_tensors": len(self.checkpoint.tensors),
            "accounts": self.accounts,
            "num_quantized": len(self.quantized),
            "source_nbytes": self.checkpoint.nbytes,
            "read_nbytes": self.read_nbytes,
            "total_size": self.total_size,
            "output_nbytes": self.output_nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "bits_per_quantized_weight": round(self.bits_per_quantized_weight, 4),
            "peak_nbytes": self.peak_nbytes,
            "workers": self.execution.workers,
            "method": self.job.method,
            "statistics": self.statistics.to_json() if self.statistics else None,
            "num_equalized": len(self.factors.wanted) if self.factors else 0,
            "notes": list(self.notes),
            "budget": self.budget and self.budget.to_json(),
            "digest": self.digest,
            "quantization_config": self.quantization_config and dict(self.quantization_config),
            "files": {shard.file: shard.nbytes for shard in self.shards},
            "side_files": [file.path for file in self.checkpoint.side_files],
            "dropped_files": [file.path for file in self.checkpoint.dropped_files],
            "index": INDEX_NAME if self.index else None,
            "tensors": [_task_json(task) for task in self.tasks],
            "dropped_tensors": {dropped.ref.name: dropped.reason for dropped in self.dropped},
        }


def _num_elements(tasks: Sequence[Task]) -> int:
    """Weights, unpacked; of each shape once."""
    return sum(count * prod(shape) for shape, count in Counter([task.source.shape for task in tasks]).items())


# Where a stored tensor ended, by the operation of the task that read it.
_ACCOUNTS: dict[Operation, str] = {
    "copy": "copied", "split": "copied", "quantize": "quantized", "repack": "repacked", "dequantize": "decoded",
}  # fmt: skip


def _without_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def _task_json(task: Task) -> dict[str, Any]:
    return {
        "name": task.source.name,
        "inputs": [ref.name for ref in task.inputs],
        "dtype": task.source.dtype,
        "shape": list(task.source.shape),
        "role": role_of(task),
        "operation": task.operation,
        "scheme": task.scheme.label if task.scheme else None,
        "reason": task.reason,
        "evidence": task.evidence,
        "outputs": [output.name for output in task.outputs],
        "output_nbytes": task.output_nbytes,
    }
