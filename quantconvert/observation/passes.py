"""The model run over all windows: layer by layer, each loaded once and alone in memory, or all of it at once.

Layer by layer, the model is called once with all windows. Each layer, when its turn comes, is loaded, runs window by
window, and is dropped: between layers there are only the hidden states. What the model hands to a layer it has made
itself (masks, positions), so that nothing needs to be known of its kind. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantconvert.observation.model import Layer, Weights, drop, empty_parameters
from quantconvert.observation.watch import Sums, Watch


class NotByLayers(Exception):
    """The model does not call its layers in a way that lets them run window by window."""


Take = Callable[[dict[str, Sums]], None]


def run_by_layers(weights: Weights, layers: Sequence[Layer], windows: Tensor, watch: Watch, take: Take) -> None:
    """One call of the model. take: gets the sums of each layer once the next one begins.

    Raises `NotByLayers`; the layers are as they were afterwards.
    """
    current: list[str] = []

    def run(layer: Layer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if current and current[-1] != layer.name:
            take(watch.take())
        current.append(layer.name)
        weights.load(layer.tensors)
        if missing := empty_parameters(layer.module):
            raise NotByLayers(f"`{layer.name}.{missing[0]}` is not among the layer's own tensors")
        try:
            outputs = []
            for i in range(len(windows)):
                part = partial(_window, i, len(windows))
                outputs.append(_checked(forward(*_each(part, args), **_each(part, kwargs)), len(windows)))
                watch.forget()
            return _joined(outputs)
        finally:
            drop(layer.module)

    for layer in layers:
        layer.module.forward = partial(run, layer, layer.module.forward)
    try:
        with torch.no_grad():
            weights.model(**inputs_of(weights.model, windows))
        watch.forget()
        take(watch.take())
    finally:
        for layer in layers:
            del layer.module.forward


def run_whole(weights: Weights, layers: Sequence[Layer], windows: Tensor, watch: Watch, take: Take) -> None:
    """One call of the model for each window, with all of its layers in memory."""
    for layer in layers:
        weights.load(layer.tensors)
    with torch.no_grad():
        for window in windows:
            weights.model(**inputs_of(weights.model, window.unsqueeze(0)))
            watch.forget()
    take(watch.take())


def inputs_of(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """What the model is called with; a decoder that has an encoder beside it reads the same."""
    more = {"decoder_input_ids": windows} if model.config.is_encoder_decoder else {}
    return {"input_ids": windows, **more}


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with its tensors changed, whatever they lie in."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_each(change, item) for item in value)
    return {key: _each(change, item) for key, item in value.items()} if isinstance(value, dict) else value


def _window(i: int, count: int, x: Tensor) -> Tensor:
    """The part of window `i` where the first axis is that of the windows; what has one for all of them stays."""
    return x[i : i + 1] if x.dim() > 1 and x.shape[0] == count else x


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif value is not None:
        raise NotByLayers(f"a layer returns {type(value).__name__}")


def _checked(output: Any, count: int) -> Any:
    """What a layer returns for one window."""
    for x in _tensors(output):
        if count > 1 and (x.dim() < 2 or x.shape[0] != 1):
            raise NotByLayers(f"a layer returns a tensor of shape {list(x.shape)} for one window")
    return output


def _joined(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    return None if first is None else type(first)(map(_joined, zip(*outputs, strict=True)))
