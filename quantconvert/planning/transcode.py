"""Deciding what starts from a quantized checkpoint: another layout for the same codes, or plain weights again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.engines import engine_notes
from quantconvert.errors import QuantConvertError, UnsupportedError, UsageError, raise_all, some
from quantconvert.families import Classifier
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS, Layout, Stored
from quantconvert.methods import METHODS
from quantconvert.options import PlainDType
from quantconvert.planning.decided import Decided, meets, select
from quantconvert.planning.decision import Decision
from quantconvert.planning.lower import Lowering
from quantconvert.planning.memory import execution_for
from quantconvert.planning.presence import check_presence
from quantconvert.schemes import Scheme, activations_problem
from quantconvert.sources import Read, Sources, as_stored, find_sources, known_methods

PLAIN_TAGS: dict[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class _Target:
    """The layout to write, and whether inputs are to be quantized that the source leaves alone."""

    layout: Layout
    activations: bool

    def scheme(self, scheme: Scheme) -> Scheme:
        """What the stored scheme is in the result: a weight-only layout drops the activations' part."""
        kept = scheme.activations and not self.layout.weight_only
        return replace(scheme, activations=self.activations or kept, static=scheme.static and kept)

    def problems(self, stored: Stored) -> Iterator[tuple[str, str]]:
        """Why the result cannot hold a stored weight, with the hint."""
        scheme = self.scheme(stored.scheme)
        for problem in self.layout.problems(scheme, stored.shape, stored.module):
            yield problem, "--format compressed-tensors"
        reason = activations_problem(scheme) if self.activations else None
        if reason:
            yield reason, "leave --activations out, or convert the original checkpoint with --scheme W8A8"


def decide_transcode(
    checkpoint: Checkpoint, job: Job, read: Callable[[TensorRef], bytes], dtype: PlainDType | None
) -> Decided:
    """To `job.format`, or to plain numbers of `dtype`; raises every refusal at once."""
    errors: list[QuantConvertError] = []
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, read, errors)
    if job.format not in LAYOUTS and not dtype:
        known = ", ".join(LAYOUTS)
        raise UsageError(f"--format: expected {known}, got `{job.format}`", hint="repack asks for one of them by name")
    target = None if dtype else _Target(LAYOUTS.find(job.format), job.activations is not None)
    _check(checkpoint, sources, target, errors)
    lacks = () if errors else check_presence(checkpoint, sources, classifier, job, errors)
    raise_all(errors)
    tag = PLAIN_TAGS[dtype] if dtype else None
    decisions = [_decision(read, sources, classifier, target, tag) for read in _as_stored(sources.reads)]
    lowering = Lowering(target.layout if target else None, METHODS.find(job.method), execution_for(job.limits))
    selection = select(decisions, lowering, classifier)
    reason = f"from {sources.method}, " + (f"as {dtype}" if dtype else "the same codes")
    loadable = meets(checkpoint, classifier, selection.has_experts)
    if target:
        loadable = replace(loadable, layout=target.layout.name, schemes=tuple(selection.schemes))
    notes = (*lacks, *_dropped_activations(sources, target), *engine_notes(loadable))
    return Decided(checkpoint, job, classifier, sources, decisions, lowering, reason, notes, selection, loadable, dtype)


def _dropped_activations(sources: Sources, target: _Target | None) -> Iterator[str]:
    """What a weight-only layout does not say of a source that quantizes activations too."""
    acting = [read for read in sources.reads if read.stored and read.stored.scheme.activations]
    if acting and target and target.layout.weight_only:
        yield (
            f"{len(acting)} layers of the source quantize their activations too; {target.layout.name} is weight-only, "
            "so that engines will compute them in high precision"
        )


def _decision(
    read: Read, sources: Sources, classifier: Classifier, target: _Target | None, tag: str | None
) -> Decision:
    role = classifier.role(read)
    if read.num_bits is None:
        return Decision(read, role.reason or "plain", "not quantized in the source", role.is_expert)
    stored = read.stored
    why = f"{sources.method}, {stored.scheme.label}" if stored else str(sources.method)
    is_expert = role.is_expert or ".experts." in read.name
    if target is None or stored is None:
        return Decision(read, None, why, is_expert, dtype=tag)
    return Decision(read, None, why, is_expert, scheme=target.scheme(stored.scheme))


def _check(checkpoint: Checkpoint, sources: Sources, target: _Target | None, errors: list[QuantConvertError]) -> None:
    """There must be something to change, and the layout asked for must hold it."""
    weights = [read for read in sources.reads if read.num_bits]
    if not weights and not errors:
        block = checkpoint.quantization_block
        found = f"quant_method `{block.get('quant_method', '')}`" if block else "no quantization_config"
        errors.append(
            UnsupportedError(
                f"`{checkpoint.location}` is not quantized in a layout that can be read back: config.json has {found}",
                hint=f"layouts: {', '.join(known_methods())}",
            )
        )
    found_problems: dict[tuple[str, str], list[str]] = {}
    for weight in weights:
        for problem in _problems(weight, target):
            found_problems.setdefault(problem, []).append(weight.module)
    for (text, hint), modules in found_problems.items():
        errors.append(UnsupportedError(f"{text}: {some(modules)}", hint=hint))
    schemes = list(dict.fromkeys(target.scheme(w.stored.scheme) for w in weights if w.stored)) if target else []
    mixed = target.layout.mix_problem(schemes) if target and len(schemes) > 1 else None
    if mixed:
        errors.append(
            UnsupportedError(f"{mixed}: {', '.join(s.label for s in schemes)}", hint="--format compressed-tensors")
        )


def _problems(weight: Read, target: _Target | None) -> Iterator[tuple[str, str]]:
    """What the target cannot hold, with the hint."""
    stored = weight.stored
    if target is None and weight.view.expert is not None:
        yield "fused experts are not written back as one tensor", "quantconvert convert --requantize splits them"
    elif target is None and weight.view.transposed:
        yield "weights that the family stores [in, out] are not turned back", "load the quantized ones"
    elif target is None and len(weight.shape) != 2:
        yield "fused experts are not written back as one tensor", "quantconvert convert --requantize splits them"
    elif target is not None and stored is None:
        yield f"{weight.encoding} holds no integer codes", "quantconvert convert --requantize, or dequantize"
    elif target is not None and stored is not None:
        if stored.only_dequantize:
            yield stored.only_dequantize, "quantconvert dequantize reads it"
        yield from target.problems(stored)


def _as_stored(reads: Sequence[Read]) -> list[Read]:
    """Plain weights that conversion would split or turn stay the stored tensors that they are, each once."""
    kept: dict[str, Read] = {}
    for read in reads:
        whole = read if read.num_bits or read.is_stored else as_stored(read.values)
        kept.setdefault(whole.name, whole)
    return list(kept.values())
