"""From a checkpoint's tensors to its weights: the one place that knows every kind of input."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import CheckpointError, QuantConvertError, UnsupportedError, some
from quantconvert.families import KEEP_BY_NAME, Family
from quantconvert.layouts import LAYOUTS
from quantconvert.patterns import WEIGHT_SUFFIX
from quantconvert.sources.codes import find_stored, is_quantized
from quantconvert.sources.experts import split_source
from quantconvert.sources.fp8 import find_fp8
from quantconvert.sources.mxfp4 import find_mxfp4
from quantconvert.sources.read import Dropped, Source, Sources, Weight, refs_of

METHODS = ("fp8", "fbgemm_fp8", "mxfp4", *LAYOUTS)
# Scales of activations and of the key/value cache: they belong to the source's quantization and end with it.
_ACTIVATION_SCALES = re.compile(
    r"\.(input_scale|activation_scale|input_scale_ub|input_zero_point|output_scale|[kqv]_scale|kv_scale|prob_scale)$"
)
_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "half": "F16", "float": "F32"}


def find_sources(
    checkpoint: Checkpoint,
    family: Family | None,
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
) -> Sources:
    """Every tensor of the checkpoint as planning sees it, each stored byte in exactly one place.

    read: the bytes of a small tensor (GPTQ's zero points, for their symmetry). Refusals are appended to `errors`.
    """
    shared = {ref.name: Dropped(ref, f"the same bytes as `{first}`") for ref, first in _aliases(checkpoint)}
    refs = {ref.name: ref for ref in checkpoint.tensors if ref.name not in shared}
    block = checkpoint.quantization_block
    method = str(block.get("quant_method", "unknown method")) if block is not None else None
    if method is not None and method not in METHODS:
        errors.append(
            UnsupportedError(
                f"source `{checkpoint.location}` is already quantized, by a method that is not read: `{method}`",
                hint=f"methods that are decoded: {', '.join(METHODS)}; or give the original checkpoint",
            )
        )
        return Sources(tuple(refs.values()), method=method)
    weights = _quantized(checkpoint, refs, block or {}, method, read, errors)
    method = weights[0].encoding if weights and method is None else method
    plain, scales = _placed(refs, weights, method)
    _check_strays(plain, errors)
    if checkpoint.quantization_block is not None and not weights and not errors:
        errors.append(
            CheckpointError(
                f"config.json of `{checkpoint.location}` says that it is quantized by `{method}`, but no tensor is",
                hint="remove its quantization_config if the weights are plain",
            )
        )
    config = checkpoint.text_config
    tensors: list[Source] = plain
    if family is not None and (family.fused_experts or family.transposed):
        tensors = [part for source in plain for part in split_source(source, family, config, errors)]
    _check_names(tensors, errors)
    return Sources(tuple(tensors), (*shared.values(), *scales), method)


def _placed(
    refs: Mapping[str, TensorRef], weights: list[Weight], method: str | None
) -> tuple[list[Source], list[Dropped]]:
    """Quantized weights in the places of their values, everything else as it is; and the scales that end with them."""
    leads = {weight.values.name: weight for weight in weights}
    partners = {ref.name for weight in weights for ref in refs_of(weight)}
    sources: list[Source] = []
    dropped = []
    for ref in refs.values():
        if ref.name in leads:
            sources.append(leads[ref.name])
        elif ref.name not in partners and method and _ACTIVATION_SCALES.search(ref.name):
            dropped.append(Dropped(ref, f"activation scale of the source's own quantization (`{method}`)"))
        elif ref.name not in partners:
            sources.append(ref)
    return sources, dropped


def _quantized(
    checkpoint: Checkpoint,
    refs: Mapping[str, TensorRef],
    block: Mapping[str, Any],
    method: str | None,
    read: Callable[[TensorRef], bytes],
    errors: list[QuantConvertError],
) -> list[Weight]:
    """Every quantized weight; the tensors tell their kind, the config only what they leave open."""
    dtype = _float_tag(checkpoint)
    try:
        weights = [*find_fp8(refs, block, dtype, errors), *find_mxfp4(refs, dtype, errors)]
    except CheckpointError as error:
        errors.append(error)
        return []
    if method in LAYOUTS:
        taken = {ref.name for weight in weights for ref in refs_of(weight)}
        rest = [r for r in refs.values() if r.name not in taken and not _ACTIVATION_SCALES.search(r.name)]
        if rest and any(is_quantized(ref) for ref in rest):
            layout, stored = find_stored(checkpoint, rest, read, errors)
            for one in stored:
                weights.append(
                    Weight(
                        one.module + WEIGHT_SUFFIX, one.shape, one.scale.dtype, "codes", one.refs,
                        num_bits=one.scheme.num_bits, stored=one, layout=layout.name,
                    )
                )  # fmt: skip
    return weights


def _float_tag(checkpoint: Checkpoint) -> str:
    """The model's float type by its config, in which decoded weights are held; bfloat16 unless told."""
    for config in (checkpoint.text_config, checkpoint.config):
        name = config.get("dtype", config.get("torch_dtype"))
        if isinstance(name, str) and name in _TAGS:
            return _TAGS[name]
    return "BF16"


def _check_strays(sources: list[Source], errors: list[QuantConvertError]) -> None:
    """A scale without its weight, or codes that nothing explains: copied, they would be taken for a plain model."""
    strays = [source for source in sources if isinstance(source, TensorRef) and is_quantized(source)]
    if strays and not errors:
        errors.append(
            CheckpointError(
                f"{len(strays)} tensors belong to a quantization of which the other tensors are missing, or that is "
                f"not read: {some([ref.name for ref in strays])}",
                hint="give the whole checkpoint, or the original one in bfloat16, float16 or float32",
            )
        )


def _check_names(sources: list[Source], errors: list[QuantConvertError]) -> None:
    """One weight a name: a plain form beside the quantized one, or an expert beside the fused ones, contradict."""
    first: dict[str, Source] = {}
    for source in sources:
        other = first.setdefault(source.name, source)
        if other is not source and not errors:
            names = [f"`{refs_of(one)[0].name}`" for one in (other, source)]
            errors.append(CheckpointError(f"`{source.name}` is stored twice: as {' and as '.join(names)}"))


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
