"""One tiny model of every model type of transformers: from its config class, with every width and count made small.

Widths are divided by one number, so that what has to agree (heads, projections between towers) still does; the largest
of `DIVISORS` with which the class can be built is taken. Of layers one of each kind stays. Weights are not random: each
parameter is filled with its own number, so that a stored tensor tells which parameters it came from, whatever
transformers calls it in a file, cuts it into or joins it with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch

DIVISORS = (32, 16, 8, 4, 2)
MAPPINGS = (
    "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
)  # fmt: skip
ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "LMHeadModel")

_WIDTH = re.compile(
    r"hidden|intermediate|inner|ffn|embed|emb_dim|d_model|d_ff|d_kv|dim|dff|lora_rank|width|n_embd|projector|mlp|rank"
    r"|channels|filters|adapter_input_size|conv_output_size|upsample_groups|codebook_size|mrope_section"
)
_NO_WIDTH = re.compile(
    r"vocab|layers|window|num_|kernel|position|activation|block|idx|index|heads|multiplier|in_channels|patch_size"
    r"|image_size|conv_hidden|sscp|subsampling_conv|audio_channels"
)
_LAYERS = re.compile(
    r"^(num_hidden_layers|num_layers|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|n_layers?"
    r"|depth|layers|conf_num_hidden_layers|num_global_layers|num_blocks)$"
)
# The most that counts may be.
_MOST = {
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
    "num_experts_per_token": 2, "moe_top_k": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "zero_expert_num": 2, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "num_kv_shared_layers": 0, "num_nextn_predict_layers": 0, "max_window_layers": 1,
    "max_position_embeddings": 64, "n_positions": 64, "num_position_embeddings": 64, "max_source_positions": 64,
    "max_target_positions": 64, "vocab_size": 96, "decoder_vocab_size": 96, "vocab_size_per_layer_input": 96,
    "audio_vocab_size": 64, "shape_vocab_size": 32, "pronunciation_vocab_size": 32, "entity_vocab_size": 32,
    "encoder_hash_byte_group_vocab": 32, "ngram_vocab_size_base": 200, "split_ngram_parts": 1, "num_residual_layers": 1,
    "num_embeddings": 64, "num_filters": 4,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 4}
_HEAD = {"head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_TWO_HEADS = {"vision_config.num_attention_heads": 2, "vision_config.hidden_size": 32}
# What config classes leave open or do not let be made small, by model type; a dot leads inside.
SPECIAL: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "hunyuan_v1_dense": _HEAD, "hunyuan_v1_moe": _HEAD, "hunyuan_vl": {"text_config.head_dim": 8}, "ministral": _HEAD,
    "nemotron": _GROUPED, "moonshine_streaming": _GROUPED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "esm": {"vocab_size": 33}, "reformer": {"axial_pos_embds_dim": [2, 6]},
    "cohere_compass": {"text_config.rope_parameters": _BOTH_ROPES},
    "cohere_compass_text": {"rope_parameters": _BOTH_ROPES},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}, "vq_config.base_channels": 32},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()}, "qwen4_exp_text": _INDEXER,
    "kimi_k25": _TWO_HEADS, "step3p7": _TWO_HEADS,
}  # fmt: skip


def model_classes() -> dict[str, str]:
    """Model type to the name of its class: what generates, or fills in what is masked."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            if name.endswith(ENDINGS):
                found.setdefault(kind, name)
    return found


def build(model_type: str, class_name: str) -> Any:
    """The model, tiny, each parameter filled with its own number; raises what its class raises."""
    import transformers
    from transformers import initialization
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, class_name)
    config_class = CONFIG_MAPPING[model_type]
    own = model_class.config_class
    config_class = config_class if own is None or issubclass(config_class, own) else own
    special = SPECIAL.get(model_type, {})
    failures: list[Exception] = []
    for divisor, whole in product(DIVISORS, (False, True)):
        try:
            config = config_class(**_merged(_shrunk(_defaults(config_class, special), divisor, whole), special))
            with torch.device("meta"), initialization.no_init_weights():
                return _numbered(model_class(config))
        except Exception as failure:  # whatever the class says of its config
            failures.append(failure)
    raise failures[0]


def _defaults(config_class: Any, special: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(config_class().to_dict())
    except Exception:  # no config of its own passes its checks
        return dict(config_class(**_merged({}, special)).to_dict())


def _merged(values: dict[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in special.items():
        *path, last = key.split(".")
        inside = values
        for name in path:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return values


def _shrunk(config: Mapping[str, Any], divisor: int, whole: bool) -> dict[str, Any]:
    """The values of a config that are to be others; `whole`: of configs inside, what is not to be others too."""
    found: dict[str, Any] = dict(_one_of_each_kind(config))
    layers = next((len(value) for value in found.values()), None)
    for key, value in config.items():
        if key in found:
            continue
        if isinstance(value, dict) and "model_type" in value:
            own = {name: v for name, v in value.items() if name == "model_type" or (whole and isinstance(v, int | str))}
            found[key] = own | _shrunk(value, divisor, whole)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif key.endswith("token_id"):
            found[key] = min(value, 95)
        elif key in _MOST:
            found[key] = min(value, _MOST[key])
        elif _LAYERS.match(key):
            found[key] = layers or min(value, 2)
        elif _WIDTH.search(key) and not _NO_WIDTH.search(key) and value >= 32:
            found[key] = max(2, value // divisor)
    return found


def _one_of_each_kind(config: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Lists with an entry a layer, cut down to one layer of each kind, but to two at least."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    count = next((config[key] for key in names if isinstance(config.get(key), int)), 0)
    lists = {k: v for k, v in config.items() if isinstance(v, list | tuple) and len(v) == count > 2}
    kinds: dict[tuple[str, ...], int] = {}
    for i, kind in enumerate(zip(*(map(json.dumps, v) for k, v in lists.items() if "theta" not in k), strict=True)):
        kinds.setdefault(kind, i)
    kept = sorted(kinds.values()) if len(kinds) > 1 else [0, 1]
    for key, values in lists.items():
        yield key, [values[i] for i in kept]


def _numbered(model: Any) -> Any:
    """The model on the CPU; tied parameters have one number."""
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number + 1)
        for buffer in model.buffers():
            buffer.zero_()
    return model
