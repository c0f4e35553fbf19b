"""Deciding what starts from a quantized checkpoint: another layout for the same codes, or plain weights again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.engines import engine_notes
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all, some
from quantconvert.families import Classifier
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS, Layout
from quantconvert.methods import METHODS
from quantconvert.options import PlainDType
from quantconvert.planning.decided import Decided, meets, select
from quantconvert.planning.decision import Decision
from quantconvert.planning.lower import Lowering
from quantconvert.planning.memory import execution_for
from quantconvert.planning.presence import check_presence
from quantconvert.schemes import Scheme
from quantconvert.sources import Read, Sources, as_stored, find_sources, known_methods

PLAIN_TAGS: dict[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def decide_transcode(
    checkpoint: Checkpoint, job: Job, read: Callable[[TensorRef], bytes], dtype: PlainDType | None
) -> Decided:
    """To `job.format`, or to plain numbers of `dtype`; raises every refusal at once."""
    errors: list[QuantConvertError] = []
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, read, errors)
    target = None if dtype else LAYOUTS.find(job.format)
    _check(checkpoint, sources, target, errors)
    lacks = () if errors else check_presence(checkpoint, sources, classifier, job, errors)
    raise_all(errors)
    tag = PLAIN_TAGS[dtype] if dtype else None
    decisions = [_decision(read, sources, classifier, target, tag) for read in _as_stored(sources.reads)]
    lowering = Lowering(target, METHODS.find(job.method), execution_for(job.limits))
    selection = select(decisions, lowering, classifier)
    reason = f"from {sources.method}, " + (f"as {dtype}" if dtype else "the same codes")
    loadable = meets(checkpoint, classifier, selection.has_experts)
    if target:
        loadable = replace(loadable, layout=target.name, schemes=tuple(selection.schemes))
    notes = (*lacks, *_dropped_activations(sources, target), *engine_notes(loadable))
    return Decided(checkpoint, job, classifier, sources, decisions, lowering, reason, notes, selection, loadable, dtype)


def _dropped_activations(sources: Sources, target: Layout | None) -> Iterator[str]:
    """What a weight-only layout does not say of a source that quantizes activations too."""
    acting = [read for read in sources.reads if read.stored and read.stored.scheme.activations]
    if acting and target and target.weight_only:
        yield (
            f"{len(acting)} layers of the source quantize their activations too; {target.name} is weight-only, so that "
            "engines will compute them in high precision"
        )


def _decision(read: Read, sources: Sources, classifier: Classifier, target: Layout | None, tag: str | None) -> Decision:
    role = classifier.role(read)
    if read.num_bits is None:
        return Decision(read, role.reason or "plain", "not quantized in the source", role.is_expert)
    stored = read.stored
    why = f"{sources.method}, {stored.scheme.label}" if stored else str(sources.method)
    is_expert = role.is_expert or ".experts." in read.name
    if target is None or stored is None:
        return Decision(read, None, why, is_expert, dtype=tag)
    return Decision(read, None, why, is_expert, scheme=_scheme(target, stored.scheme))


def _check(checkpoint: Checkpoint, sources: Sources, target: Layout | None, errors: list[QuantConvertError]) -> None:
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
    schemes = list(dict.fromkeys(_scheme(target, w.stored.scheme) for w in weights if w.stored)) if target else []
    mixed = target.mix_problem(schemes) if target and len(schemes) > 1 else None
    if mixed:
        errors.append(
            UnsupportedError(f"{mixed}: {', '.join(s.label for s in schemes)}", hint="--format compressed-tensors")
        )


def _problems(weight: Read, target: Layout | None) -> Iterator[tuple[str, str]]:
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
        for problem in target.problems(_scheme(target, stored.scheme), weight.shape, weight.module):
            yield problem, "--format compressed-tensors"


def _as_stored(reads: Sequence[Read]) -> list[Read]:
    """Plain weights that conversion would split or turn stay the stored tensors that they are, each once."""
    kept: dict[str, Read] = {}
    for read in reads:
        whole = read if read.num_bits or read.is_stored else as_stored(read.values)
        kept.setdefault(whole.name, whole)
    return list(kept.values())


def _scheme(target: Layout, scheme: Scheme) -> Scheme:
    """What the stored scheme is in another layout: a weight-only one drops the activations' part."""
    return replace(scheme, activations=False, static=False) if scheme.activations and target.weight_only else scheme
