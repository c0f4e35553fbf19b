"""Mixed precision by budget (`--target-bits`): which layers get 8 bits, given what 4 bits take from each.

A set is what engines load as one layer: q/k/v, gate/up, the experts of a layer, or one weight. All begin at the job's
own scheme. The gain of raising one is

    weight * (noise at 4 bits - noise at 8 bits) * number of weights / extra bits

where noise is the quantization's sum of squares over that of the weights, and `weight` is 3 for a set that has a value
projection, 1 for any other. Sets are raised in the order of their gains, those that no longer fit are passed over.

Why 3: raising q/k/v removed 0.112 of KL a bit, the other layers 0.033, in a model of 135 M parameters (int4 groups,
columns equalized); in one of 2.5 M parameters (`examples/tiny-llama`) all kinds of layers gained alike, by bits. Within
one kind the noise tells layers apart hardly better than chance: no measure without data was found that does. So this
spends bits sensibly, and no more is claimed; it is the default nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from quantconvert.errors import UnsupportedError, UsageError
from quantconvert.families import Classifier, FusedSet
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS
from quantconvert.patterns import cover, experts_of
from quantconvert.planning.plan import Plan
from quantconvert.planning.spent import Budget, Point
from quantconvert.planning.tasks import Quantize
from quantconvert.rules import Rule
from quantconvert.schemes import Scheme

VALUE_WEIGHT = 3.0
# Projections that give values, alone or in a layer that holds keys and queries too.
_VALUE = re.compile(
    r"(^|\.)(v_proj|value|v|v_lin|qkv_proj|qkv|query_key_value|Wqkv|W_pack|c_attn|wqkv|in_proj_qkv\w*|kv_b_proj)$"
)


@dataclass(frozen=True, slots=True)
class RaisedSet:
    """Weights that change their scheme together, and what they take at the base scheme and raised."""

    tasks: tuple[Quantize, ...]
    nbytes: int
    raised_nbytes: int

    @property
    def num_weights(self) -> int:
        return sum(task.num_elements for task in self.tasks)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(task.source.module for task in self.tasks)

    @property
    def weight(self) -> float:
        return VALUE_WEIGHT if any(map(_VALUE.search, self.modules)) else 1.0


@dataclass(frozen=True, slots=True)
class Offer:
    """What may be raised. fixed_nbytes, fixed_weights: quantized weights that a rule, or their width, has decided.

    base, raised: the two schemes, in the layout that holds both. rule: the name of the raised one. others: modules that
    no pattern for raised ones may match. notes: what the plan has to say of it.
    """

    sets: tuple[RaisedSet, ...]
    fixed_nbytes: int
    fixed_weights: int
    base: Scheme
    raised: Scheme
    rule: str
    others: tuple[str, ...]
    layout: str
    fused: tuple[FusedSet, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_weights(self) -> int:
        return self.fixed_weights + sum(found.num_weights for found in self.sets)

    @property
    def least(self) -> float:
        """Bits a quantized weight with nothing raised."""
        return 8 * (self.fixed_nbytes + sum(found.nbytes for found in self.sets)) / self.num_weights

    @property
    def most(self) -> float:
        """Bits a quantized weight with everything raised."""
        return 8 * (self.fixed_nbytes + sum(found.raised_nbytes for found in self.sets)) / self.num_weights

    def check(self, target: float) -> None:
        """Raises `UsageError` for a target out of reach."""
        cheapest = min(found.raised_nbytes - found.nbytes for found in self.sets)
        first = self.least + 8 * cheapest / self.num_weights
        if target < first - 5e-4:
            raise UsageError(
                f"--target-bits {target:g}: expected at least {first:.3f}: {self.base.label} takes {self.least:.3f} in "
                f"{self.layout}, scales included, and raising the smallest set of layers {first - self.least:.3f} more",
                hint="more columns a group, or no --preset and no rules at 8 bits, take fewer bits",
            )
        if target > self.most + 5e-4:
            raise UsageError(
                f"--target-bits {target:g}: expected at most {self.most:.3f}, what every layer at 8 bits takes",
                hint="--bits 8",
            )


def find_offer(job: Job, plan: Plan, plan_of: Callable[[Job], Plan]) -> Offer:
    """What a job, which has no target, could raise. plan: its plan; plan_of: that of another job for the same
    checkpoint.

    A second plan, with one set raised, shows the layout that holds both schemes, or raises its refusal.
    """
    if job.base.num_bits != 4:
        raise UsageError(f"--target-bits raises layers from 4 bits to 8: expected --bits 4, got {job.base.num_bits}")
    rule = "W8A8" if job.base.activations else "W8A16:channel"
    groups = _groups(plan, job)
    if not groups:
        raise UnsupportedError(
            "--target-bits finds no layer to raise: rules and widths have decided all of them",
            hint="drop a --rule, or --target-bits",
        )
    others, fused = tuple(task.source.module for task in plan.tasks), Classifier(plan.checkpoint).fused
    first = rules_for([task.source.module for task in groups[0]], others, rule, fused)
    probe = plan_of(replace(job, rules=(*job.rules, *first)))
    layout, request = LAYOUTS[probe.format], job.request(rule)
    assert request is not None
    base, raised = (wanted.settled(layout.is_symmetric) for wanted in (job.base, request))

    def nbytes(tasks: Sequence[Quantize], scheme: Scheme) -> int:
        return sum(
            spec.nbytes for task in tasks for spec in layout.outputs(task.source.shape, task.source.dtype, scheme)
        )

    sets = tuple(RaisedSet(tuple(g), nbytes(g, base), nbytes(g, raised)) for g in groups)
    own = {module for found in sets for module in found.modules}
    fixed = [task for task in probe.quantized if task.source.module not in own]
    fixed_nbytes, fixed_weights = sum(t.output_nbytes for t in fixed), sum(t.num_elements for t in fixed)
    notes = []
    if base.symmetric and not LAYOUTS[plan.format].is_symmetric(base.num_bits) and job.base.symmetric is None:
        notes.append(
            f"--target-bits: {layout.name} holds both widths, symmetric unless --asymmetric; {plan.format}, which is "
            "written without --target-bits, has zero points, which may be worth more than the bits"
        )
    return Offer(sets, fixed_nbytes, fixed_weights, base, raised, rule, others, layout.name, fused, tuple(notes))


def _groups(plan: Plan, job: Job) -> list[list[Quantize]]:
    """Weights that engines want under one scheme, where all of them have the job's own, in the plan's order."""
    base = job.base.settled(LAYOUTS[plan.format].is_symmetric)
    keys = _keys([task.source.module for task in plan.tasks], Classifier(plan.checkpoint).fused)
    groups: dict[str, list[Quantize]] = {}
    decided = set()
    for task in plan.tasks:
        key = keys[task.source.module]
        if isinstance(task, Quantize) and task.scheme == base:
            groups.setdefault(key, []).append(task)
        elif len(task.source.shape) == 2:
            decided.add(key)
    return [found for key, found in groups.items() if key not in decided]


def _keys(modules: Sequence[str], fused: Sequence[FusedSet]) -> dict[str, str]:
    """One name for all members of a set: the experts of a layer, what is fused (sets that overlap are one), or one."""
    found: dict[str, str] = {}
    first = {fused_set.members: fused_set for fused_set in fused}
    joined: dict[str, str] = {}  # a member's last word to that of the first member that it is joined to
    for members in first:
        root = next((joined[member] for member in members if member in joined), members[0])
        joined |= dict.fromkeys(members, root)
    for module in modules:
        stem, dot, last = module.rpartition(".")
        found[module] = experts_of(module) or f"{stem}{dot}{joined.get(last, last)}"
    return found


def rules_for(modules: Sequence[str], others: Sequence[str], rule: str, fused: Sequence[FusedSet]) -> tuple[Rule, ...]:
    """Rules that give `modules`, and none of the others, the scheme named `rule`."""
    chosen = set(modules)
    rest = [module for module in others if module not in chosen]
    return tuple(Rule(pattern, rule) for pattern in cover(modules, rest, [(f.name, f.members) for f in fused]))


def spend(offer: Offer, noises: Mapping[str, tuple[float, float, float]], target: float) -> Budget:
    """Raise sets until `target` bits a quantized weight are spent.

    noises: by weight, the sums of squares of the weight, of the error at the base scheme, and of that at the raised.
    Gains are compared to nine digits, then by the plan's order, so that the outcome is the same everywhere.
    """
    offer.check(target)
    budget = target * offer.num_weights / 8
    losses = [_losses(found, noises) for found in offer.sets]
    total = sum(base for base, _ in losses) or 1.0

    def gain(i: int) -> float:
        extra = offer.sets[i].raised_nbytes - offer.sets[i].nbytes
        return float(f"{(losses[i][0] - losses[i][1]) / max(1, extra):.9g}")

    nbytes = offer.fixed_nbytes + sum(found.nbytes for found in offer.sets)
    left, everything, everything_left = total, nbytes, total
    raised: list[str] = []
    curve, count = [Point(8 * nbytes / offer.num_weights, 1.0)], 0
    for i in sorted(range(len(offer.sets)), key=lambda i: (-gain(i), i)):
        found, (base, after) = offer.sets[i], losses[i]
        extra = found.raised_nbytes - found.nbytes
        everything, everything_left = everything + extra, everything_left - base + after
        curve.append(Point(8 * everything / offer.num_weights, everything_left / total))
        if nbytes + extra <= budget * (1 + 1e-9):
            nbytes, left, count = nbytes + extra, left - base + after, count + 1
            raised += found.modules
    spent = Point(8 * nbytes / offer.num_weights, left / total)
    rules = rules_for(raised, offer.others, offer.rule, offer.fused)
    return Budget(target, spent, count, len(offer.sets), offer.rule, rules, tuple(curve))


def _losses(found: RaisedSet, noises: Mapping[str, tuple[float, float, float]]) -> tuple[float, float]:
    """The weighted noise of a set before and after, in weights."""
    signal, base, raised = (sum(noises[task.source.name][k] for task in found.tasks) for k in range(3))
    scale = found.weight * found.num_weights / signal if signal else 0.0
    return scale * base, scale * raised
