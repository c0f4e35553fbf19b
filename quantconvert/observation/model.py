"""The model without its weights, which are loaded and dropped part by part, and what its parts are called.

Built by transformers from config.json, in float32, parameters on the meta device. Tensors of the checkpoint find their
parameters by transformers' own renamings and merges. Agrees with transformers 5.21 to 5.23: `core_model_loading.py`
(`rename_source_key`, `convert_and_load_state_dict_in_model`), `modeling_utils.py` (`LoadStateDictConfig`).
Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantconvert.buffers import bytes_of, torch_dtype
from quantconvert.checkpoint import TensorRef
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import CheckpointError, UnsupportedError
from quantconvert.machine import give_back_memory
from quantconvert.sources import Read

Advance = Callable[[str, int], None]
# Parameters of a module for all experts of a layer that multiply the module's own input; `weight`: of one such matrix.
_READ_INPUT = ("weight", "gate_up_proj", "gate_proj", "up_proj")


def build(config: Any) -> Any:
    """The base model (no output head) of a config, in float32, its parameters on the meta device, its buffers real.

    Raises `UnsupportedError` for what transformers does not build, and for a model that reads no text.
    """
    import transformers

    names = [name for name in config.architectures or () if name.endswith("Model") and hasattr(transformers, name)]
    own: Any = getattr(transformers, names[0]) if names else None  # the encoder of a pair, alone
    auto: Any = transformers.AutoModel
    how: dict[str, Any] = {"dtype": torch.float32}
    with _without_parameters():
        try:
            model = own._from_config(config, **how) if own else auto.from_config(config, trust_remote_code=False, **how)
        except Exception as error:  # whatever a config makes transformers raise
            raise UnsupportedError(f"transformers builds no model of this config: {error}") from error
    if model.main_input_name != "input_ids":
        raise UnsupportedError(f"this model reads {model.main_input_name}: observe gives it text only")
    return model.eval()


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Parameters that are registered meanwhile become empty: memory that nobody has touched is given back."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else _empty(param))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _empty(param: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)


@dataclass(frozen=True, slots=True)
class Layer:
    """A module of the model that is loaded as one, by name, with the stored tensors of its parameters."""

    name: str
    module: nn.Module
    tensors: tuple[TensorRef, ...]

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors)


class Weights:
    """The stored tensors of a model's parameters. advance: told of each stored tensor that is read."""

    def __init__(self, model: Any, refs: Sequence[TensorRef], files: Files, advance: Advance) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model, self.files, self.advance = model, files, advance
        self._mapping: list[Any] = list(get_model_conversion_mapping(model))
        self._known: dict[str, Tensor] = model.state_dict()
        self.parameters = {ref.name: name for ref in refs if (name := self._parameter(ref.name)) is not None}
        self.refs = {ref.name: ref for ref in refs if ref.name in self.parameters}

    def _parameter(self, stored: str) -> str | None:
        """The parameter or buffer that a stored tensor goes into, alone or with others; None where there is none."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known, prefix = self._known, self.model.base_model_prefix
        name, _ = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, _ = rename_source_key(stored, [], [], base_model_prefix=prefix, meta_state_dict=known)
        return name if name in known else None

    def layers(self) -> list[Layer]:
        """The members of the outermost lists of modules, in the model's order."""
        below: dict[str, list[TensorRef]] = {name: [] for name in _members(self.model)}
        for stored, name in self.parameters.items():
            parts = name.split(".")
            found = next((p for i in range(len(parts)) if (p := ".".join(parts[:i])) in below), None)
            if found is not None:
                below[found].append(self.refs[stored])
        return [Layer(name, self.model.get_submodule(name), tuple(refs)) for name, refs in below.items()]

    def load(self, refs: Iterable[TensorRef]) -> None:
        """Fill the parameters of these stored tensors."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        state = {ref.name: self._read(ref) for ref in refs}
        if not state:
            return
        how = LoadStateDictConfig(dtype=torch.float32, weight_mapping=deepcopy(self._mapping))
        info, _ = convert_and_load_state_dict_in_model(self.model, state, how, None)
        wrong = [*map(str, info.conversion_errors), *map(str, info.mismatched_keys), *map(str, info.error_msgs)]
        if wrong:
            raise CheckpointError(f"transformers cannot load `{wrong[0]}` of the source")

    def _read(self, ref: TensorRef) -> Tensor:
        tensor = torch.empty(ref.shape, dtype=torch_dtype(ref.dtype))
        if tensor.numel():
            self.files.read_into(ref.file, bytes_of(tensor), ref.offset)
        self.advance(ref.name, ref.nbytes)
        return tensor


def drop(module: nn.Module) -> None:
    """Give back the memory of a module's parameters."""
    for part in module.modules():
        for name, param in part._parameters.items():
            part._parameters[name] = None if param is None else _empty(param)
    give_back_memory()


def empty_parameters(module: nn.Module) -> list[str]:
    """Names of parameters that hold no values."""
    return [name for name, param in module.named_parameters() if param.is_meta]


def _members(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{prefix}{name}.{i}" for i, part in enumerate(child) if any(True for _ in part.parameters()))
        else:
            yield from _members(child, f"{prefix}{name}.")


@dataclass(frozen=True, slots=True)
class Watchable:
    """Modules of the model that read what linear layers of the checkpoint do.

    modules: by the name of the first of those layers, with in_features. names: that name for each linear layer.
    """

    modules: Mapping[str, tuple[nn.Module, int]]
    names: Mapping[str, str]


def watchable(weights: Weights, reads: Iterable[Read]) -> Watchable:
    """What can be watched. Layers for which transformers has no module are left out, and of experts that are one
    module those that do not read the module's own input.
    """
    from transformers.pytorch_utils import Conv1D

    modules: dict[str, tuple[nn.Module, int]] = {}
    names: dict[str, str] = {}
    keys: dict[tuple[str, int], str] = {}
    for read in reads:
        owner, _, last = weights.parameters.get(read.values.name, "").rpartition(".")
        module = weights.model.get_submodule(owner) if owner else None
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and last == "weight"
        is_stack = module is not None and last in _READ_INPUT and getattr(module, last).dim() == 3
        if module is not None and (is_linear or is_stack):
            names[read.module] = keys.setdefault((owner, read.shape[1]), read.module)
            modules.setdefault(names[read.module], (module, read.shape[1]))
    return Watchable(modules, names)
