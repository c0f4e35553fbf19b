"""transformers reads the `rtn` layout (`quantconvert.layouts.simple`) once this module is imported.

    import quantconvert.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=RtnConfig(bits=4, group_size=128))

The second quantizes a plain checkpoint while it loads: the same model, bit for bit, as one that was converted first
(`--format rtn --no-equalize`; `rtn_loading`).
Linear layers keep their codes and are dequantized in every `forward`; `model.dequantize()` trades memory for speed.
What transformers merges while it loads, such as the experts of a layer, is dequantized before the merge and stays so.
Which modules are quantized is read from the checkpoint's headers and their names are mapped to the model's by
transformers' own renamings, so that a config written for checkpoint names holds for models that name them otherwise.

Agrees with transformers 5.21 to 5.23: `quantizers/base.py` (`serialized_names`, `get_load_operations`,
`update_weight_conversions`), `core_model_loading.py` (`rename_source_key`, `WeightConverter`) and
`integrations/compressed_tensors.py` (`CompressedTensorsDequantize`), whose analogue for rtn this is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quantconvert.errors import CheckpointError, UnsupportedError
from quantconvert.integrations.rtn_files import Header, check, is_quantized, read_headers
from quantconvert.integrations.rtn_linear import RtnLinear, dequantize_all
from quantconvert.layouts.simple import Simple
from quantconvert.planning import Quantize
from quantconvert.schemes import NUM_BITS, Scheme, width_of

NAME = Simple.name
MINIMUM = "5.21"


def _needs_transformers(error: ImportError) -> NoReturn:
    try:
        found = f"found {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        found = "found none"
    needed = f"transformers>={MINIMUM}"
    raise ImportError(f"{__name__} needs {needed}, {found}: {error}\n\nhint: pip install '{needed}'") from error


try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        ConversionOps,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if not hasattr(HfQuantizer, "get_load_operations"):
        raise ImportError("transformers.quantizers.base.HfQuantizer has no get_load_operations")

    from quantconvert.integrations.rtn_loading import RtnQuantize, RtnRound, check_dtype, check_stored, plan_of
except ImportError as error:
    _needs_transformers(error)

logger = logging.get_logger(__name__)


class RtnConfig(QuantizationConfigMixin):
    """The config block of the layout: `group_size` -1 is per channel, 0 per tensor; patterns match checkpoint names."""

    def __init__(
        self,
        bits: int,
        group_size: int,
        symmetric: bool = True,
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = NAME,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config has fields that {NAME} does not know: {', '.join(unknown)}")
        self.quant_method = quant_method  # type: ignore[assignment]  # a plain str serves: see register_quantizer
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.overrides = {pattern: dict(fields) for pattern, fields in (overrides or {}).items()}
        for pattern in (*self.modules_to_not_convert, *self.overrides):
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"quantization_config: `{pattern}` is no regular expression: {error}") from None
        for fields in ({}, *self.overrides.values()):
            self._scheme(fields)

    def _scheme(self, fields: Mapping[str, Any]) -> Scheme:
        known: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        if not fields.keys() <= known.keys():
            raise CheckpointError(f"quantization_config: cannot override {', '.join(fields.keys() - known.keys())}")
        known.update(fields)
        if known["bits"] not in NUM_BITS:
            raise CheckpointError(f"quantization_config: expected bits 4 or 8, got {known['bits']}")
        strategy, group = width_of(known["group_size"])
        return Scheme(known["bits"], known["symmetric"], strategy, group)

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a module by its checkpoint name; the first override that matches counts."""
        return self._scheme(next((f for pattern, f in self.overrides.items() if re.match(pattern, module)), {}))

    def is_kept(self, module: str) -> bool:
        return any(re.match(pattern, module) for pattern in self.modules_to_not_convert)


class RtnDequantize(ConversionOps):
    """Runs before the operations of transformers' own converters: from lists of stored tensors (`...weight`,
    `...weight_scale`, `...weight_zero_point`: one a checkpoint module) to one tensor [modules, O, I] each.

    As `CompressedTensorsDequantize` does, it fills one tensor rather than a list that `MergeModulelist` would copy.
    """

    supports_many_to_many = True  # one fused weight may be split; its scales are gone by then

    def __init__(self, hf_quantizer: RtnHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this attribute `get_new_dtype` knows not to cast what comes in

    def __deepcopy__(self, memo: object) -> RtnDequantize:
        """Itself: transformers copies the converter for every tensor it reads, and this holds the whole plan."""
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Plain weights of the layer's dtype, computed from codes and scales where it is quantized."""
        dtype = model.get_parameter(full_layer_name).dtype
        bits = self.hf_quantizer.merged_bits.get(full_layer_name)
        result: dict[str, Any] = {}
        for key in [key for key in input_dict if key.endswith(".weight")]:
            weights = input_dict.pop(key)
            if bits is None:
                result[key] = [weight.to(dtype) for weight in weights]
                continue
            scales = input_dict.pop(f"{key}_scale")
            result[key] = dequantize_all(weights, scales, input_dict.pop(f"{key}_zero_point", None), bits, dtype)
        return result

    @property
    def reverse_op(self) -> NoReturn:
        raise UnsupportedError(f"weights that transformers merged while loading cannot be written as {NAME} again")


class RtnHfQuantizer(HfQuantizer):
    """Puts `RtnLinear` where the checkpoint has codes, and `RtnDequantize` before every merge."""

    quantization_config: RtnConfig
    requires_calibration = False
    serialized_names = {"weight": ["weight", "weight_scale", "weight_zero_point"]}  # noqa: RUF012 (as the base has it)

    def __init__(self, quantization_config: RtnConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.merged_bits: dict[str, int] = {}  # by the model's name of a parameter that quantized weights merge into
        # by the model's name of a parameter that is quantized while it loads: its scheme, and the files' dtype
        self.loading: dict[str, tuple[Scheme, str]] = {}

    def get_load_operations(self) -> dict[str, type[RtnDequantize]]:
        return {"dequantize": RtnDequantize}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError(f"{NAME} is not loaded in parts on several devices (tp_plan, distributed_config)")
        tensors = read_headers(checkpoint_files)
        planned = None if self.pre_quantized else self._plan(checkpoint_files, model)
        merged: dict[str, dict[Scheme | None, str]] = {}
        for module, target, converter in _places(model, tensors):
            scheme = self._scheme_of(module, tensors) if planned is None else planned.get(module)
            if planned is not None and scheme:
                self._expect(target, scheme, tensors[f"{module}.weight"][0])
            if converter is not None:
                merged.setdefault(target, {}).setdefault(scheme, module)
                if scheme and not all(source.endswith(".weight") for source in converter.source_patterns):
                    raise UnsupportedError(f"`{module}`: transformers merges it by {converter}, which {NAME} cannot")
            elif scheme:
                name = target.removesuffix(".weight")
                model.set_submodule(name, RtnLinear(_plain_linear(model, name), scheme))
        self.merged_bits = _one_width_each(merged)

    def _expect(self, target: str, scheme: Scheme, tag: str) -> None:
        """A parameter will be quantized while it loads, from files of dtype `tag`."""
        _, known = self.loading.setdefault(target, (scheme, tag))
        if known != tag:
            raise UnsupportedError(f"`{target}` merges weights, which must share one dtype, got {known} and {tag}")

    def _plan(self, files: Sequence[str] | None, model: Any) -> dict[str, Scheme]:
        """What to quantize of a plain checkpoint, by module; the config says from now on what a conversion's would."""
        plan = plan_of(files, self.quantization_config)
        tasks = [task for task in plan.tasks if isinstance(task, Quantize)]
        check_stored(tasks)
        check_dtype(tasks, model.dtype)
        self.quantization_config = RtnConfig(**plan.quantization_config or {})
        return {task.source.module: task.scheme for task in tasks}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Of a plain checkpoint: what an `RtnLinear` waits for."""
        return param_name in self.loading and param_name not in self.merged_bits

    def get_quantize_ops(self) -> RtnQuantize:
        return RtnQuantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Of a plain checkpoint: every merge rounds first, where its result is to be quantized."""
        if self.pre_quantized:
            return super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-any-return,no-untyped-call]
        return [
            entry.copy(
                entry._original_source_patterns,
                entry._original_target_patterns,
                operations=[RtnRound(self), *entry.operations],
            )
            if isinstance(entry, WeightConverter) and self.merged_bits
            else entry
            for entry in weight_conversions
        ]

    def _scheme_of(self, module: str, tensors: Mapping[str, Header]) -> Scheme | None:
        """By the config, for a module that holds codes; both must agree."""
        if not is_quantized(tensors[f"{module}.weight"]):
            return None
        if self.quantization_config.is_kept(module):
            raise CheckpointError(f"`{module}` is quantized, but named by modules_to_not_convert")
        scheme = self.quantization_config.scheme_of(module)
        check(module, scheme, tensors)
        return scheme

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Freezes the scales: `set_param_for_module` lets gradients into all that is floating point."""
        for name, module in model.named_modules():
            if isinstance(module, RtnLinear):
                module.weight_scale.requires_grad_(False)
            elif isinstance(module, nn.Linear) and not module.weight.is_floating_point():
                raise UnsupportedError(f"`{name}`: codes went into an ordinary layer, as {NAME} knows no key_mapping")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Ordinary linear layers in place of all `RtnLinear`; then it can be saved as an ordinary checkpoint, too.

        dtype: `model.config.dtype` unless the user said otherwise, which `save_pretrained` leaves as a str.
        """
        for name, module in list(model.named_modules()):
            if isinstance(module, RtnLinear):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                weight = module.dequantize()
                linear.weight = nn.Parameter(weight.to(dtype) if isinstance(dtype, torch.dtype) else weight)
                linear.register_parameter("bias", module.bias)
                model.set_submodule(name, linear)
        model._weight_conversions = None  # `save_pretrained` reverts transformers' own conversions, without ours
        return model

    def is_serializable(self) -> bool:
        if self.merged_bits:
            logger.warning(f"experts were dequantized while loading: call `model.dequantize()` before saving ({NAME})")
        return not self.merged_bits

    @property
    def is_trainable(self) -> bool:
        return False


def _places(model: Any, tensors: Mapping[str, Header]) -> Iterator[tuple[str, str, WeightConverter | None]]:
    """Each checkpoint module with a weight, the model's parameter for it, and what merges it with others, if anything.

    As `convert_and_load_state_dict_in_model` finds them; weights without a place in the model are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if name.endswith(".weight") and target in known:
            yield name.removesuffix(".weight"), target, by_pattern[pattern] if pattern else None


def _plain_linear(model: Any, name: str) -> nn.Linear:
    """The module to be replaced; a subclass with a `forward` of its own computes something else."""
    module = model.get_submodule(name)
    if f"{name}.weight" in model.all_tied_weights_keys:
        raise UnsupportedError(f"`{name}` is quantized, but the model ties it to the embeddings")
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise UnsupportedError(f"`{name}` is quantized, but {type(module).__name__} is no ordinary linear layer")
    return module


def _one_width_each(merged: Mapping[str, Mapping[Scheme | None, str]]) -> dict[str, int]:
    """Bits by merged parameter; only those that are quantized."""
    for target, schemes in merged.items():
        if len(schemes) > 1:
            kinds = ", ".join(f"`{module}`: {s.label if s else 'not quantized'}" for s, module in schemes.items())
            raise UnsupportedError(f"`{target}` merges weights, which must share one scheme, got {kinds}")
    return {target: scheme.num_bits for target, schemes in merged.items() for scheme in schemes if scheme}


def _register() -> None:
    """Once or, should this module be imported again, anew."""
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        other = mapping.get(NAME)
        if other is not None and other.__module__ != __name__:
            raise ImportError(f"transformers has a quantization method `{NAME}` already: {other!r}")
        mapping.pop(NAME, None)
    auto.register_quantization_config(NAME)(RtnConfig)
    auto.register_quantizer(NAME)(RtnHfQuantizer)


_register()
