"""From a checkpoint's tensors to what is read: the one place that asks every encoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError, some
from quantconvert.families import KEEP_BY_NAME, Family
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources.codes import Codes, is_activation_scale, is_quantized
from quantconvert.sources.encoding import Context
from quantconvert.sources.experts import split_read
from quantconvert.sources.read import PLAIN, Dropped, Read, Sources, as_stored
from quantconvert.sources.registry import ENCODINGS
from quantconvert.sources.steps import STEPS, StepContext

_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "half": "F16", "float": "F32"}


def known_methods() -> tuple[str, ...]:
    """Every `quant_method` that some encoding reads."""
    return tuple(dict.fromkeys(method for encoding in ENCODINGS.values() for method in encoding.methods))


def find_sources(
    checkpoint: Checkpoint,
    family: Family | None,
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
    steps: Sequence[str] = (),
    codes_first: bool = False,
) -> Sources:
    """Every tensor of the checkpoint as planning sees it, each stored byte in exactly one place. codes_first: what a
    layout of ours holds is told as its codes, where it could be read as mere numbers too (float8).

    read: the bytes of a small tensor (GPTQ's zero points, for their symmetry). steps: names of registered kinds of
    steps, which are added in that order. Refusals are appended to `errors`.
    """
    shared = {ref.name: Dropped(ref, f"the same bytes as `{first}`") for ref, first in _aliases(checkpoint)}
    refs = {ref.name: ref for ref in checkpoint.tensors if ref.name not in shared}
    block = checkpoint.quantization_block
    method = str(block.get("quant_method", "unknown method")) if block is not None else None
    if method is not None and method not in known_methods():
        errors.append(
            UnsupportedError(
                f"source `{checkpoint.location}` is already quantized, by a method that is not read: `{method}`",
                hint=f"methods that are decoded: {', '.join(known_methods())}; or give the original checkpoint",
            )
        )
        return Sources(tuple(map(as_stored, refs.values())), method=method)
    context = Context(checkpoint, refs, block or {}, method, _float_tag(checkpoint), read, errors)
    weights = _encoded(context, codes_first)
    method = weights[0].encoding if weights and method is None else method
    reads, scales = _placed(refs, weights, method)
    _check_strays(reads, errors)
    if block is not None and not weights and not errors:
        errors.append(
            CheckpointError(
                f"config.json of `{checkpoint.location}` says that it is quantized by `{method}`, but no tensor is",
                hint="remove its quantization_config if the weights are plain",
            )
        )
    config = checkpoint.text_config
    if family is not None and (family.fused_experts or family.transposed):
        reads = [part for whole in reads for part in split_read(whole, family, config, errors)]
    _check_names(reads, errors)
    steps_context = StepContext(config, family, read, checkpoint, {})
    for name in steps:
        reads = STEPS.find(name).plan(reads, steps_context, errors)
    return Sources(tuple(reads), (*shared.values(), *scales), method, steps_context.changes)


def _encoded(context: Context, codes_first: bool) -> list[Read]:
    """Every weight that is not plain, encoding by encoding; the tensors tell their kind, the config what they leave."""
    weights: list[Read] = []
    left = dict(context.refs)
    for encoding in sorted(ENCODINGS.values(), key=lambda e: codes_first and e.name != Codes.name):
        if encoding.name == PLAIN:
            continue
        try:
            found = list(encoding.find(replace(context, refs=left)))
        except CheckpointError as error:
            context.errors.append(error)
            return []
        weights += found
        for read in found:
            for ref in read.refs.values():
                left.pop(ref.name, None)
    return weights


def _placed(
    refs: Mapping[str, TensorRef], weights: Sequence[Read], method: str | None
) -> tuple[list[Read], list[Dropped]]:
    """Weights in the places of their values, what no encoding took as it is; and the scales that end with them."""
    partners = {ref.name for weight in weights for ref in weight.refs.values()}
    leads = {weight.values.name: weight for weight in weights}
    reads: list[Read] = []
    dropped = []
    for ref in refs.values():
        if ref.name in partners:
            if ref.name in leads:
                reads.append(leads[ref.name])
        elif method and is_activation_scale(ref.name):
            dropped.append(Dropped(ref, f"activation scale of the source's own quantization (`{method}`)"))
        else:
            reads.append(as_stored(ref))
    return reads, dropped


def _float_tag(checkpoint: Checkpoint) -> str:
    """The model's float type by its config, in which decoded weights are held; bfloat16 unless told."""
    for config in (checkpoint.text_config, checkpoint.config):
        name = config.get("dtype", config.get("torch_dtype"))
        if isinstance(name, str) and name in _TAGS:
            return _TAGS[name]
    return "BF16"


def _check_strays(reads: Sequence[Read], errors: list[QuantConvertError]) -> None:
    """A scale without its weight, or codes that nothing explains: copied, they would be taken for a plain model."""
    strays = [read.values for read in reads if read.encoding == PLAIN and is_quantized(read.values)]
    if strays and not errors:
        errors.append(
            CheckpointError(
                f"{len(strays)} tensors belong to a quantization of which the other tensors are missing, or that is "
                f"not read: {some([ref.name for ref in strays])}",
                hint="give the whole checkpoint, or the original one in bfloat16, float16 or float32",
            )
        )


def _check_names(reads: Sequence[Read], errors: list[QuantConvertError]) -> None:
    """One weight a name: a plain form beside the quantized one, or an expert beside the fused ones, contradict."""
    first: dict[str, Read] = {}
    for read in reads:
        other = first.setdefault(read.name, read)
        if other is not read and not errors:
            names = f"as `{other.values.name}` and as `{read.values.name}`"
            errors.append(CheckpointError(f"`{read.name}` is stored twice: {names}"))


def _aliases(checkpoint: Checkpoint) -> Iterator[tuple[TensorRef, str]]:
    """Embeddings and heads that are the same bytes as another (in a torch file): tied, so that the embedding is enough.

    A config that says `tie_word_embeddings: false` keeps them all.
    """
    if checkpoint.config.get("tie_word_embeddings", checkpoint.text_config.get("tie_word_embeddings")) is False:
        return
    same: dict[tuple[str, int, int], list[TensorRef]] = {}
    for ref in checkpoint.tensors if any(file.path.endswith(".bin") for file in checkpoint.weight_files) else ():
        if ref.nbytes and _is_table(ref.name):
            same.setdefault((ref.file, ref.offset, ref.nbytes), []).append(ref)
    for refs in same.values():
        kept = next((ref for ref in refs if _is_table(ref.name, ("embedding",))), refs[0])
        yield from ((ref, kept.name) for ref in refs if ref is not kept)


def _is_table(name: str, kinds: tuple[str, ...] = ("embedding", "lm_head")) -> bool:
    """Whether a tensor is an embedding or an output head, by what names mean in every family."""
    module = name.removesuffix(WEIGHT_SUFFIX)
    if any(re.search(pattern, module) for pattern, reason in KEEP_BY_NAME if reason in kinds):
        return True
    return "lm_head" in kinds and module.endswith((".decoder", "_head", ".output"))
