"""Vision-language models: tiny ones of transformers' own making, and what of each is quantized."""

from __future__ import annotations

from typing import Any

from tests.engines.families import Case, each

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
# Towers have odd sizes, so that a rule that took one for a layer to quantize would fail.
EYE = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
       "patch_size": 14}  # fmt: skip
QWEN_EYE = {"depth": 1, "num_heads": 2}
QWEN3_EYE = QWEN_EYE | {
    "hidden_size": 40, "intermediate_size": 72, "out_hidden_size": 64, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN2_TEXT = TEXT | {"head_dim": None, "rope_parameters": ROPE}


def decoder(root: str) -> tuple[str, ...]:
    layer = f"{root}.layers.N"
    return each(f"{layer}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj") + each(
        f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"
    )


def embedded(root: str, head: str | None) -> dict[str, str]:
    return {f"{root}.embed_tokens.weight": "embedding"} | ({f"{head}.weight": "lm_head"} if head else {})


def vision(*names: str, root: str = "") -> dict[str, str]:
    return {f"{root}{name}": "vision" for name in names}


def weights(stem: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in each(stem, *names))


CLIP = "vision_tower.vision_model"
CLIP_LAYER = weights(f"{CLIP}.encoder.layers.N", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "self_attn.out_proj", "mlp.fc1", "mlp.fc2")  # fmt: skip
CLIP_VISION = vision(*CLIP_LAYER, *weights(f"{CLIP}.embeddings", "patch_embedding", "position_embedding"))
SIGLIP_VISION = CLIP_VISION | vision(
    *weights(f"{CLIP}.head", "attention.out_proj", "mlp.fc1", "mlp.fc2"),
    f"{CLIP}.head.attention.in_proj_weight", f"{CLIP}.head.probe",
)  # fmt: skip
PROJECTOR = vision(*weights("multi_modal_projector", "linear_1", "linear_2"))
PIXTRAL_LAYER = "vision_tower.transformer.layers.N"
PIXTRAL_VISION = vision(
    "vision_tower.patch_conv.weight",
    *weights(f"{PIXTRAL_LAYER}.attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    *weights(f"{PIXTRAL_LAYER}.feed_forward", "gate_proj", "up_proj", "down_proj"),
)
QWEN_BLOCK = ("blocks.N.attn.proj.weight", "blocks.N.attn.qkv.weight", "patch_embed.proj.weight")
MERGER = ("merger.mlp.N.weight",)
INSIDE = "language_model.model"
NESTED = embedded(INSIDE, "language_model.lm_head")
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def llava(model: str, text: str, eye: str, kept: dict[str, str]) -> Case:
    config = {"text_config": TEXT | {"model_type": text}, "vision_config": EYE | {"model_type": eye}} | UNTIED
    return Case(f"{model}ForConditionalGeneration", config, decoder(INSIDE), NESTED | kept)


CASES = {
    "llava": llava("Llava", "llama", "clip_vision_model", CLIP_VISION | PROJECTOR),
    "llava_next": llava("LlavaNext", "mistral", "clip_vision_model", CLIP_VISION | PROJECTOR),
    "llava_onevision": llava("LlavaOnevision", "qwen2", "siglip_vision_model", SIGLIP_VISION | PROJECTOR),
    "pixtral": llava("Llava", "mistral", "pixtral", PIXTRAL_VISION | PROJECTOR),
    "mistral3": llava(
        "Mistral3", "mistral", "pixtral",
        PIXTRAL_VISION | PROJECTOR | vision("multi_modal_projector.patch_merger.merging_layer.weight"),
    ),
    "gemma3": Case(
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": EYE, "mm_tokens_per_image": 4},
        decoder(INSIDE),
        embedded(INSIDE, None) | SIGLIP_VISION | vision("multi_modal_projector.mm_input_projection_weight"),
    ),
    "qwen2_vl": Case(
        "Qwen2VLForConditionalGeneration",
        {"text_config": QWEN2_TEXT, "vision_config": QWEN_EYE | {"embed_dim": 40, "hidden_size": 64}} | UNTIED,
        decoder("model"),
        embedded("model", "lm_head")
        | vision(*QWEN_BLOCK, *MERGER, *weights("blocks.N.mlp", "fc1", "fc2"), root="visual."),
    ),
    "qwen2_5_vl": Case(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": QWEN2_TEXT, **UNTIED, "vision_config": QWEN_EYE | {
            "hidden_size": 40, "intermediate_size": 72, "out_hidden_size": 64, "fullatt_block_indexes": [0]}},
        decoder("model"),
        embedded("model", "lm_head")
        | vision(*QWEN_BLOCK, *MERGER, *weights("blocks.N.mlp", "gate_proj", "up_proj", "down_proj"), root="visual."),
    ),
    "qwen3_vl": Case(
        "Qwen3VLForConditionalGeneration",
        {"text_config": TEXT, "vision_config": QWEN3_EYE} | UNTIED,
        decoder("model.language_model"),
        embedded("model.language_model", "lm_head")
        | vision(
            *QWEN_BLOCK, "pos_embed.weight", *weights("blocks.N.mlp", "linear_fc1", "linear_fc2"),
            *weights("merger", "linear_fc1", "linear_fc2"),
            *weights("deepstack_merger_list.N", "linear_fc1", "linear_fc2"), root="model.visual.",
        ),
    ),
}  # fmt: skip
