"""Presence: a checkpoint without its embeddings, a layer or a part of one is no model, however well it converts.

Three things are known from headers and config.json: how many layers there are, that a layer has what others of its
kind have, and what stands around the layers (the family's table). Kinds are told apart by the config's own lists
(`layer_types` and the like); without them, a layer that has less than another and nothing that the other has not is
taken for an incomplete one. For families without a table that is a guess, and said as a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any

from quantconvert.checkpoint import Checkpoint
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError
from quantconvert.families import Classifier, Family, Reason
from quantconvert.job import Job
from quantconvert.patterns import template_of
from quantconvert.sources import Read, Sources

MAX_LISTED = 8
MAX_LAYERS = 10_000
_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)\.(?=.)")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_STACK_NAMES = ("layers", "layer", "h", "block", "blocks")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
# Layers that come on top, and tables and buffers that one layer may hold for all.
_APART: frozenset[Reason] = frozenset({"mtp", "embedding", "not a weight"})
_TOWERS: frozenset[Reason] = frozenset({"vision", "audio"})
_OTHER_MODELS: frozenset[Reason] = _TOWERS | {"mtp"}
# Architectures that end in a head over the vocabulary.
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HEADS = ("lm_head", "embed_out", "output_layer", "proj_out", "head", "decoder")
# What hierarchical towers call the layers of a stage, of which each stage has another number.
_STAGE = re.compile(r"(blocks|layers)\.\d+\.")
# Keys of lists that say of each layer what it is (`layer_types`, `attention_layers`, `hybrid_override_pattern`).
_KIND_KEY = re.compile("layer|block|type|pattern")
# Keys of configs whose layers are all different on purpose.
_IRREGULAR = ("block_configs", "per_layer_config")

HINT = "download the source again, whole; --allow-incomplete converts what is there"

Layers = dict[int, set[str]]


def check_presence(
    checkpoint: Checkpoint, sources: Sources, classifier: Classifier, job: Job, errors: list[QuantConvertError]
) -> tuple[str, ...]:
    """Append a refusal that lists what is missing to `errors`; returns what is only suspected, or allowed, as notes."""
    sure, doubtful = absent(checkpoint, sources.reads, classifier)
    notes = []
    if sure and job.allow_incomplete:
        notes.append(f"--allow-incomplete: the source lacks {_listed(sure)}")
    elif sure:
        errors.append(CheckpointError(f"`{checkpoint.location}` is incomplete: it lacks {_listed(sure)}", hint=HINT))
    if doubtful:
        text = f"by its config.json and its other layers the source may lack {_listed(doubtful)}"
        if job.strict and not job.allow_incomplete:
            errors.append(UnsupportedError(f"--strict: {text}", hint="accept that by --allow-incomplete"))
        notes.append(f"{text}: are files missing?")
    return tuple(notes)


def absent(checkpoint: Checkpoint, tensors: Sequence[Read], classifier: Classifier) -> tuple[list[str], list[str]]:
    """What the checkpoint lacks, in words: what is certain, and what is only likely (families without a table)."""
    config, family = checkpoint.text_config, classifier.family
    stacks, towers, outside = find_stacks(tensors, classifier)
    likely = [*_short(stacks, config)]
    for stack, layers in stacks.items():
        likely += _missing_in_layers(stack, layers, config, family)
    for stack, layers in towers.items() if family else ():
        likely += _missing_in_layers(stack, layers, {}, None)
    if family and stacks:
        likely += _missing_around(checkpoint, outside, family, stacks)
    gaps = [*_gaps(stacks), *(_gaps(towers) if family else ())]
    return ([*gaps, *likely], []) if family else (gaps, likely)


def find_stacks(
    tensors: Sequence[Read], classifier: Classifier
) -> tuple[dict[str, Layers], dict[str, Layers], list[str]]:
    """The numbered layers of the language model, and of towers: for each stack (`model.layers`) and number the names;
    and names of the model that have no number.

    A stack counts that has a linear weight by the family's table or, without one, bears a name that layers bear; of a
    tower, one that bears such a name.
    """
    stacks: dict[str, Layers] = {}
    towers: dict[str, Layers] = {}
    found: dict[tuple[str, bool], tuple[str, set[str]]] = {}  # by what a name begins with
    linear = set()
    outside = []
    for tensor, role in zip(tensors, classifier.roles(tensors), strict=True):
        match = _NUMBERED.match(tensor.name)
        if match is None and role.reason not in _OTHER_MODELS:
            outside.append(tensor.name)
        if match is None or role.reason in _APART or len(match[2]) > 6:
            continue
        key = match[0], role.reason in _TOWERS
        if key not in found:
            stack, layers = match[1] or "", towers if key[1] else stacks
            found[key] = stack, layers.setdefault(stack, {}).setdefault(int(match[2]), set())
        stack, names = found[key]
        names.add(tensor.name[match.end() :])
        if role.reason is None and (role.by_table or (classifier.family is None and _is_layers(stack))):
            linear.add(stack)
    return (
        {stack: layers for stack, layers in stacks.items() if stack in linear},
        {stack: layers for stack, layers in towers.items() if _is_layers(stack)},
        outside,
    )


def _is_layers(stack: str) -> bool:
    return stack.rpartition(".")[2] in _STACK_NAMES


def _gaps(stacks: Mapping[str, Layers]) -> Iterator[str]:
    """Whole layers that are not there although later ones are."""
    for stack, layers in stacks.items():
        gaps = [i for i in range(min(max(layers), MAX_LAYERS)) if i not in layers]
        if gaps:
            yield f"`{stack}.{_numbers(gaps)}` ({'whole layers' if len(gaps) > 1 else 'a whole layer'})"


def _short(stacks: Mapping[str, Layers], config: Mapping[str, Any]) -> Iterator[str]:
    """Whole layers at the end that the config counts; where several stacks may be meant, one as long is enough."""
    by_key: dict[str, list[str]] = {}
    for stack in stacks:
        key = count_key(stack, config)
        if key:
            by_key.setdefault(key, []).append(stack)
    for key, names in by_key.items():
        stack, last = max(((name, max(stacks[name])) for name in names), key=lambda item: item[1])
        missing = range(last + 1, min(config[key], MAX_LAYERS))
        if missing:
            yield f"`{stack}.{_numbers(missing)}` (config.json: {key} {config[key]})"


def count_key(stack: str, config: Mapping[str, Any]) -> str | None:
    """The config's key that says how many layers a stack such as `model.layers` has, if one does."""
    parts = stack.split(".")
    keys: tuple[str, ...] = _LAYER_COUNTS
    if parts[-1] == "albert_layer_groups":
        keys = ("num_hidden_groups",)
    elif "decoder" in parts:
        keys = ("decoder_layers", "num_decoder_layers", *_LAYER_COUNTS)
    elif "encoder" in parts:
        keys = ("encoder_layers", *_LAYER_COUNTS)
    return next((key for key in keys if type(config.get(key)) is int), None)


def _missing_in_layers(stack: str, layers: Layers, config: Mapping[str, Any], family: Family | None) -> Iterator[str]:
    """What single layers lack that others of their kind have, and experts by the config's count."""
    yield from _folded(stack, _lacking(layers, config, family))


def lacking(tensors: Sequence[Read], classifier: Classifier, config: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that single layers of the language model lack."""
    stacks, _, _ = find_stacks(tensors, classifier)
    found = {stack: _lacking(layers, config, classifier.family) for stack, layers in stacks.items()}
    return {f"{stack}.{number}.{name}" for stack, lacks in found.items() for number, name in lacks}


def _lacking(layers: Layers, config: Mapping[str, Any], family: Family | None) -> set[tuple[int, str]]:
    """Number of the layer, and the name inside it, of each tensor that others of its kind have."""
    if any(config.get(key) for key in _IRREGULAR) or any(map(_STAGE.match, set().union(*layers.values()))):
        return set()
    is_uneven = cache(lambda name: any(re.search(pattern, name) for pattern in (family.uneven if family else ())))
    kind = _kinds(config, max(layers) + 1)
    by_kind: dict[tuple[object, ...], dict[frozenset[str], list[int]]] = {}
    for number, names in sorted(layers.items()):
        whole = frozenset(names) - {name for name in names if is_uneven(name)}
        by_kind.setdefault(kind(number), {}).setdefault(whole, []).append(number)
    found: set[tuple[int, str]] = set()
    for signatures in by_kind.values():
        for have, numbers in signatures.items():
            larger = [other for other in signatures if have < other]
            # without a table (and in towers), what as many lack as have may be on purpose
            if larger and (family or len(numbers) < sum(len(signatures[other]) for other in larger)):
                found |= {(number, name) for number in numbers for name in min(larger, key=len) - have}
    if family and family.experts:
        missing: dict[frozenset[str], list[str]] = {}  # of alike layers once
        for number, names in layers.items():
            own = frozenset(names)
            if own not in missing:
                missing[own] = list(_missing_experts(own, config))
            found |= {(number, name) for name in missing[own]}
    return found


def _kinds(config: Mapping[str, Any], count: int) -> Callable[[int], tuple[object, ...]]:
    """What the config's lists (one value a layer, or one letter) say of a layer: layers of one kind have the same."""
    lengths = {count, *(config[key] for key in _LAYER_COUNTS if type(config.get(key)) is int)}
    rows = [
        value
        for key, value in config.items()
        if (isinstance(value, list) and _KIND_KEY.search(key)) or (isinstance(value, str) and "pattern" in key)
        if count <= len(value) in lengths and all(type(item) in (str, int, bool) for item in value)
    ]
    return lambda number: tuple(row[number] for row in rows)


def _missing_experts(names: Set[str], config: Mapping[str, Any]) -> Iterator[str]:
    """Each expert of a layer, as many as the config says, has what any other has."""
    count = next((config[k] for k in _EXPERT_COUNTS if type(config.get(k)) is int), 0)
    parts: dict[tuple[str, str], set[int]] = {}
    for name in names:
        match = _EXPERT.search(name)
        if match:
            parts.setdefault((name[: match.start(1)], name[match.end(1) :]), set()).add(int(match[1]))
    if not parts:
        return
    last = max(max(found) for found in parts.values())
    for (before, after), found in parts.items():
        yield from (f"{before}{i}{after}" for i in range(min(count or last + 1, MAX_LAYERS)) if i not in found)


def _folded(stack: str, lacking: Iterable[tuple[int, str]]) -> Iterator[str]:
    """One text for each kind of tensor, however many layers and experts lack it."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for number, name in sorted(lacking):
        kinds.setdefault(template_of(name), []).append((number, name))
    for template, found in kinds.items():
        name = found[0][1] if len({name for _, name in found}) == 1 else template
        numbers = sorted({number for number, _ in found})
        yield f"`{stack}.{_numbers(numbers)}.{name}`" + (f" ({len(found)} tensors)" if len(found) > 1 else "")


def _missing_around(
    checkpoint: Checkpoint, outside: Sequence[str], family: Family, stacks: Mapping[str, Layers]
) -> Iterator[str]:
    """Embeddings, norms and head, which stand outside the layers. outside: the names of all that do."""
    config = checkpoint.text_config
    weights = [name for name in outside if not name.endswith((".bias", ".beta"))]
    tails = {tail for whole in weights for name in (whole, whole.rpartition(".")[0]) for tail in _tails(name)}
    architecture = _architecture(checkpoint)
    inside = {name for layers in stacks.values() for names in layers.values() for name in names}
    has_norms = any("norm" in name or "ln_" in name for name in inside)
    for part in family.parts:
        is_other = part.unless is not None and config.get(part.unless[0]) in part.unless[1]
        is_other = is_other or (part.only is not None and not architecture.endswith(part.only))
        if is_other or ("final norm" in part.what and not has_norms) or tails.intersection(part.names):
            continue
        yield f"`{part.names[0]}` ({part.what})"
    is_bare = any("." not in stack for stack in stacks)
    if architecture.endswith(_GENERATORS) and _is_untied(checkpoint) and not is_bare and not tails.intersection(_HEADS):
        yield "`lm_head` (output head; tie_word_embeddings is false)"


def _tails(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    while name:
        yield name
        name = name.partition(".")[2]


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _is_untied(checkpoint: Checkpoint) -> bool:
    """Whether the config says so; what it leaves open differs from family to family."""
    said = [config.get("tie_word_embeddings") for config in (checkpoint.config, checkpoint.text_config)]
    return False in said and True not in said


def _numbers(numbers: Sequence[int]) -> str:
    """`3`, or `[0-2,5]`: ranges of layers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"[{text}]"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more
