"""Every model type of transformers beside what its classes say: which stored weights are those of linear layers.

A weight counts as linear where every parameter in it belongs to a `Linear` (or GPT-2's `Conv1D`), or is a 3-D one of a
class of experts; else it is to be kept. Linear layers that stay by their role need the word of transformers' classes
and names for it: towers stand in a class that says so, routers in one of theirs, heads outside every layer. What stays
for another reason is in `KEPT`. `python -m tests.engines.every_model` prints the counts.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import quantconvert
from quantconvert.patterns import template_of
from tests.builders import read_tensors
from tests.engines.tiny_models import build, model_classes

SCHEME = "W8A16:channel"  # divides every width

_LATENT = "latent attention: engines read these in high precision (vLLM `deepseek_v2.py`)"
_STATE = "steers a recurrent state: small, feeds exponentials or is read plain"
_INDEX = "an indexer's: kept or fused by engines (vLLM `deepseek_v2.py`, `Indexer`)"
_NARROW = "narrow, and beside the layers' main path"
_EMBEDS = "widens what a table of embeddings gives, once a token"
_TIED = "the table of embeddings, which the head shares"
_SOUND = "a codec's, between its convolutions"
# What is linear and stays, by the name that is stored: a regular expression to the reason.
KEPT: dict[str, str] = {
    r"\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa|wkv_a_with_mqa|wkv_b)\.weight$": _LATENT,
    r"\.(indexer|compressor)\.": _INDEX,
    r"^model\.layers\.N\.attn\.(wkv|wq_a|wo_a)\.weight$": _LATENT,
    r"\.(linear_attn|mamba|mixer|self_attn)\.(in_proj_(a|b|ba)|x_proj|dt_proj)\.weight$": _STATE,
    r"\.(self_attn|attention)\.(b_proj|f_proj|f_a_proj|f_b_proj|g_a_proj|g_b_proj)\.weight$": _STATE,
    r"\.altup(_unembed)?_projections\.|\.altup\.|\.laurel\.|\.per_layer_(input_gate|projection)\.weight$": _NARROW,
    r"\.(attn_sink_proj|sink_proj)\.weight$": _NARROW,
    r"sconv\.weight_proj(\.weight)?$": "makes a convolution's kernel",
    r"\.mlp\.shared_experts\.(shared_w13_weight|shared_w2_weight|gate_proj|up_proj|down_proj)$": "3-D, of all tokens",
    r"\.self_attention\.experts\.(input_linear|output_linear)\.weight$": "attention's: no engine reads it packed",
    r"embeddings\.(patch_projection|map_inputs_layer|projection|embedding_transformation)\.weight$": _EMBEDS,
    r"(entity_embedding_dense|embedding_projection|embedder\.linear|input_embed\.proj|time_mlp\.N)\.weight$": _EMBEDS,
    r"\.relative_pos_embeddings\.weight$": "a table of positions, multiplied",
    r"\.embeddings\.word_embeddings\.weight$": _TIED,
    r"\.conv_layers\.N\.stage\.N\.ffn\.linear[12]\.weight$": _SOUND,
    r"\.self\.(conv_kernel_layer|conv_out_layer)\.weight$": "makes a convolution's kernel",
    r"^ibert\.": "quantizes itself (`QuantLinear`)",
}  # fmt: skip
# What transformers itself cannot build small, or not with what is installed here: what it says.
UNBUILT: dict[str, str] = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "TimmWrapperModel requires the PIL library"),
    "cosmos3_edge": "`rope_parameters.mrope_section` must contain three sections",
    "ernie4_5_vl_moe": "The expanded size of the tensor",
    "granite4_vision": "integer modulo by zero",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "layer types producing a cache"),
    "zamba": "There is an issue with your definition of `tie_weights_keys`",
    "qwen3_omni_moe": "has no attribute 'shared_expert_intermediate_size'",
}
# What has no linear layer to quantize.
NOTHING = ("ibert", "squeezebert")
_TOWER = re.compile(
    r"vision|visual|image|vit|clip|audio|speech|projector|merger|resampler|qformer|pixel|perceiver|connector|encoder|adapter"
    r"|aligner|codec|tokenizer|vq|patch|dac|mimi|downsample|embedder|token2wav|code2wav|talker", re.I
)  # fmt: skip
_ROUTER = re.compile(r"router|gate|gating|topk|moe|sparse", re.I)


@dataclass(frozen=True)
class Weight:
    """A stored tensor: its name, what becomes of it (`reason` None: quantized), and the parameters in it."""

    name: str
    reason: str | None
    parameters: tuple[tuple[str, tuple[type, ...], int], ...]

    @property
    def is_linear(self) -> bool:
        return bool(self.parameters) and all(_is_linear(*parameter) for parameter in self.parameters)

    @property
    def is_partly_linear(self) -> bool:
        return any(_is_linear(*parameter) for parameter in self.parameters)

    @property
    def is_told(self) -> bool:
        """Whether transformers' classes say that a linear layer has the role for which it stays."""
        path, classes, _ = self.parameters[0]
        above = [c.__name__ for c in classes[1:]]
        if self.reason in ("vision", "audio"):
            return any(_TOWER.search(name) for name in (*above, path))
        if self.reason == "router":
            return any(_ROUTER.search(name) for name in (classes[-1].__name__, *above[-1:], path))
        return self.reason in ("lm_head", "head", "mtp") and (self.reason == "mtp" or ".N." not in template_of(path))


def _is_linear(name: str, classes: tuple[type, ...], rank: int) -> bool:
    from transformers.pytorch_utils import Conv1D

    if issubclass(classes[-1], nn.Linear | Conv1D) and name.endswith(".weight"):
        return True
    return "xpert" in classes[-1].__name__ and rank == 3 and "bias" not in name.rpartition(".")[2]


def weights(model_type: str, folder: Path) -> Iterator[Weight]:
    """The model built, saved to `folder` and planned: every weight of the result."""
    model = build(model_type, model_classes()[model_type])
    modules = dict(model.named_modules())
    parameters = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        path = name.split(".")[:-1]
        classes = tuple(type(modules[".".join(path[:i])]) for i in range(len(path) + 1))
        parameters[number + 1] = name, classes, parameter.dim()
    model.save_pretrained(folder)
    tensors = read_tensors(folder)
    for task in quantconvert.plan(folder, scheme=SCHEME, format="compressed-tensors").tasks:
        stored = tensors[next(iter(task.source.refs.values())).name]
        numbers = stored.unique().tolist() if stored.is_floating_point() else []
        yield Weight(task.source.name, task.reason, tuple(parameters[int(n)] for n in numbers if n in parameters))


def differences(found: list[Weight]) -> Iterator[str]:
    """What is quantized and not linear, or linear and kept without a word for it."""
    for weight in found:
        name = template_of(weight.name)
        if weight.reason is None and not weight.is_linear:
            yield f"{name} is quantized, and no linear layer: {weight.parameters}"
        is_listed = any(re.search(pattern, name) for pattern in KEPT)
        if weight.reason is not None and weight.is_partly_linear and not weight.is_told and not is_listed:
            yield f"{name} is linear, and kept ({weight.reason}): {weight.parameters[0][0]}"


def main() -> int:
    """Every type, counted."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    counts = dict.fromkeys(
        ("types", "not built", "nothing to quantize", "as their classes say", "with listed layers"), 0
    )
    weighed = dict.fromkeys(("quantized", "kept by role", "kept, listed"), 0)
    for model_type in sys.argv[1:] or model_classes():
        counts["types"] += 1
        if model_type in UNBUILT or model_type in NOTHING:
            counts["not built" if model_type in UNBUILT else "nothing to quantize"] += 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = list(weights(model_type, Path(folder)))
        for difference in differences(found):
            print(f"{model_type}: {difference}")
        linear = [weight for weight in found if weight.is_partly_linear]
        listed = [w for w in linear if w.reason and not w.is_told]
        counts["with listed layers" if listed else "as their classes say"] += 1
        weighed["quantized"] += sum(w.reason is None for w in linear)
        weighed["kept, listed"] += len(listed)
        weighed["kept by role"] += sum(bool(w.reason) and w.is_told for w in linear)
    print(", ".join(f"{number} {what}" for what, number in counts.items()))
    print("linear weights: " + ", ".join(f"{number} {what}" for what, number in weighed.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
