"""Quantizing to the `rtn` layout while transformers loads a plain checkpoint. Imports torch and transformers.

Which weights are quantized, and how, is what `quantconvert.plan` decides for the same folder; the codes are those that
a conversion of it would write (`--format rtn --no-equalize`), made on the CPU wherever the model goes.
Agrees with transformers 5.21 to 5.23: `quantizers/base.py` (`get_quantize_ops`, `param_needs_quantization`) and
`core_model_loading.py` (`WeightConverter.convert`, `MergeModulelist`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from quantconvert import api
from quantconvert.buffers import torch_dtype
from quantconvert.errors import CheckpointError, UnsupportedError, some
from quantconvert.integrations.rtn_linear import dequantize_all
from quantconvert.layouts.simple import Simple
from quantconvert.methods import NonFinite
from quantconvert.methods.rtn import Rtn
from quantconvert.planning import Plan, Quantize
from quantconvert.schemes import Request, Scheme, scheme_name, width_of
from quantconvert.spans import spans

if TYPE_CHECKING:
    from quantconvert.integrations.transformers import RtnConfig, RtnHfQuantizer

# Values of a block that is quantized at once, and the dtypes that each dtype of a model holds exactly.
BLOCK_ELEMENTS = 1 << 18
HOLDS = {torch.float32: ("F32", "BF16", "F16"), torch.bfloat16: ("BF16",), torch.float16: ("F16",)}


def plan_of(files: Sequence[str] | None, config: RtnConfig) -> Plan:
    """What a conversion of the folder of these files would do, by the config's own patterns; raises as `plan` does."""
    folders = {Path(file).parent for file in files or ()}
    if len(folders) != 1:
        raise UnsupportedError("rtn quantizes while loading from the files of one folder only")
    return api.plan(
        folders.pop(),
        format=Simple.name,
        method=Rtn.name,
        equalize=False,
        ignore=[f"re:{pattern}" for pattern in config.modules_to_not_convert],
        # the first override that matches counts, the last rule
        rules=[f"re:{pattern}={_named(config, fields)}" for pattern, fields in reversed(config.overrides.items())],
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
    )


def _named(config: RtnConfig, fields: Mapping[str, Any]) -> str:
    strategy, group = width_of(fields.get("group_size", config.group_size))
    bits, symmetric = fields.get("bits", config.bits), fields.get("symmetric", config.symmetric)
    return scheme_name(Request(bits, strategy, group, symmetric))


def check_stored(tasks: Iterable[Quantize]) -> None:
    """Refuse weights that are no tensor [O, I] of their own in the files: transformers hands over whole ones."""
    other = [task.source.name for task in tasks if not task.source.is_stored or task.source.view.transposed]
    if other:
        raise UnsupportedError(
            f"weights that are not stored as plain [out, in] matrices are not quantized while loading: {some(other)}",
            hint=f"convert first: quantconvert MODEL OUT --format {Simple.name}",
        )


def check_dtype(tasks: Iterable[Quantize], dtype: torch.dtype) -> None:
    """Refuse a model whose dtype would round the weights before they are quantized."""
    other = [task.source for task in tasks if task.source.dtype not in HOLDS.get(dtype, ())]
    if other:
        raise UnsupportedError(
            f"weights in {other[0].dtype} would be rounded to {dtype} before they are quantized: "
            f"{some([source.name for source in other])}",
            hint='from_pretrained(..., dtype="float32")',
        )


@torch.no_grad()
def encode(weight: Tensor, scheme: Scheme, tag: str) -> dict[str, Tensor]:
    """The tensors of the layout by suffix, on the weight's device, of a weight [O, I] whose stored dtype is `tag`."""
    method, layout = Rtn(), Simple()
    dtype, rows = torch_dtype(tag), max(2, BLOCK_ELEMENTS // weight.shape[1] // 2 * 2)

    def blocks() -> Iterable[Tensor]:
        for first, last in spans(0, weight.shape[0], rows):
            yield weight[first:last].to("cpu", torch.float32, copy=True)

    found: dict[str, list[Tensor]] = {}
    try:
        span = method.span(blocks(), scheme)
        for w_OI in blocks():
            quantized = method.quantize(w_OI, scheme, dtype, dtype, span)
            for suffix, block in layout.encode(quantized, scheme, tuple(weight.shape)).items():
                found.setdefault(suffix, []).append(block)
    except NonFinite:
        raise CheckpointError("a weight holds NaN or Inf: expected finite weights") from None
    whole = {spec.suffix: not spec.rows_per_element for spec in layout.outputs(tuple(weight.shape), tag, scheme)}
    joined = {suffix: parts[0] if whole[suffix] else torch.cat(parts) for suffix, parts in found.items()}
    return {suffix: tensor.to(weight.device) for suffix, tensor in joined.items()}


class _Whole(ConversionOps):
    """An operation that holds the quantizer, which transformers copies with every converter unless told."""

    def __init__(self, hf_quantizer: RtnHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: object) -> _Whole:
        return self

    @property
    def reverse_op(self) -> NoReturn:
        raise UnsupportedError(f"weights that were quantized while loading are written as {Simple.name} or not at all")


class RtnQuantize(_Whole):
    """One loaded weight to the parameters of its `RtnLinear`."""

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """The module's parameters by their whole names."""
        (loaded,) = input_dict.values()
        weight = loaded[0] if isinstance(loaded, list) else loaded
        scheme, tag = self.hf_quantizer.loading[full_layer_name]
        module = full_layer_name.removesuffix(".weight")
        dtype = model.get_submodule(module).weight_scale.dtype
        found = encode(weight, scheme, tag)
        found["weight_scale"] = found["weight_scale"].to(dtype)
        return {f"{module}.{suffix}": [tensor] for suffix, tensor in found.items()}


class RtnRound(_Whole):
    """Weights that transformers is about to merge, each rounded to what its codes mean: one tensor [modules, O, I]."""

    supports_many_to_many = True

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As they came where the merged parameter is not quantized."""
        if full_layer_name not in self.hf_quantizer.loading:
            return input_dict
        scheme, tag = self.hf_quantizer.loading[full_layer_name]
        dtype = model.get_parameter(full_layer_name).dtype
        result: dict[str, Any] = {}
        for key in [key for key in input_dict if key.endswith(".weight")]:
            found = [encode(weight, scheme, tag) for weight in input_dict.pop(key)]
            zero_points = None if scheme.symmetric else [blocks["weight_zero_point"] for blocks in found]
            codes, scales = ([blocks[suffix] for blocks in found] for suffix in ("weight", "weight_scale"))
            result[key] = dequantize_all(codes, scales, zero_points, scheme.num_bits, dtype)
        return result
