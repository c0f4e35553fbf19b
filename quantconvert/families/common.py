"""What names mean in every family: the second source of evidence, after config and family table."""

from __future__ import annotations

from quantconvert.families.row import FusedSet, Part, Reason

# Searched in the module name, first match wins. Sources: the weight names in transformers' model files and the
# keep lists of vLLM's and SGLang's loaders.

# Other models inside the checkpoint: their layers bear the same names as the language model's, so this comes first.
TOWERS: tuple[tuple[str, Reason], ...] = (
    (r"(^|\.)(mtp|nextn|mtp_block|eh_proj)(\.|$)", "mtp"),
    (r"(^|\.)(visual|vision_\w+|vision|image_encoder|img_\w+|vit|sam_model|multi_modal_projector|mm_projector"
     r"|mm_input_projection_weight|mm_soft_emb_norm|embed_vision|patch_embed\w*|patch_merger|image_newline|aligner"
     r"|\w*resampler|qformer|siglip\w*)(\.|$)", "vision"),
    (r"(^|\.)(audio_\w+|audio|speech_encoder|embed_audio)(\.|$)", "audio"),
)  # fmt: skip

KEEP_BY_NAME: tuple[tuple[str, Reason], ...] = (
    (r"(^|\.)(lm_head|embed_out|output_layer)$", "lm_head"),
    (r"(?i:norm\d*|layer_?norm\w*|(^|[._])ln_\w+|(^|[._])ln\d*)$", "norm"),
    (r"(^|\.)(\w*embed\w*|wte|wpe|relative_attention_bias|\w*pos_emb\w*|rotary_emb\w*"
     r"|position_\w+|cls_token|mask_token)(\.|$)|^shared$", "embedding"),
    (r"(^|\.)(?!convbert)(conv\w*|\w*_conv|\w*_conv1d|dwconv)(\.|$)", "conv"),
    (r"(^|\.)(A_log|D|dt_bias|dt_proj|x_proj|in_proj_a|in_proj_b|in_proj_ba|ssm_\w+)$", "state-space"),
    (r"(^|\.)(router|wg|gate_inp|shared_expert_gate|e_score_correction_bias|expert_bias)(\.|$)", "router"),
    (r"(^|\.)(mlp|block_sparse_moe|moe|feed_forward|ffn)\.gate(\.|$)", "router"),
    # Latent attention, which engines read in high precision (see the table of `deepseek`)
    (r"(^|\.)(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$|(^|\.)indexer\.", "family"),
)  # fmt: skip

FUSED_QKV = (FusedSet("qkv_proj", ("q_proj", "k_proj", "v_proj")),)
FUSED_COMMON: tuple[FusedSet, ...] = (*FUSED_QKV, FusedSet("gate_up_proj", ("gate_proj", "up_proj")))

# What decoders end in: a language model's head, or that of a classifier, reward or question-answering model.
KEEP_HEADS: tuple[tuple[str, Reason], ...] = (
    (r"(^|\.)lm_head$", "lm_head"),
    (r"^(score|classifier|qa_outputs|v_head(\.summary)?)$", "head"),
)

LINEAR_ATTENTION = r"\.(self_attn|attention|attn)\.(q_proj|k_proj|v_proj|o_proj)$"
LINEAR_MLP = r"\.mlp\.(gate_proj|up_proj|down_proj)$"
# NLLB-MoE and Switch Transformers say `experts.expert_0`.
EXPERT_NAMES = r"\.experts\.(N|expert_\d+)\."

# The other half of what looks at pictures, under the names that Hub checkpoints of all vision-language models share.
KEEP_VISION: tuple[tuple[str, Reason], ...] = (
    (r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|image_newline)(\.|$)", "vision"),
)
KEEP_MTP: tuple[tuple[str, Reason], ...] = ((r"(^|\.)mtp\.", "mtp"),)

EMBEDDINGS = Part("embeddings", ("embed_tokens",))
DECODER_PARTS = (EMBEDDINGS, Part("final norm", ("norm",)))
